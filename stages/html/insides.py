"""Sections on the making: stages and their cost, loss curves, alignment of layers, matrices beside attention maps."""

from __future__ import annotations

import math
from typing import Any

from ..config import CalibrateStage, Stage, TrainStage
from .elements import Html, details, duration, figure, figures, join, number, paragraph, table, text
from .pictures import map_image
from .plots import Series, line_plot
from .run_files import RunFiles


def stages(run: RunFiles) -> Html | None:
    """What was done, on how many tokens, how long it took, and the loss before and after."""
    rows = []
    for name, stage in zip(run.config.stage_names(), run.config.stages, strict=True):
        summary = run.summaries.get(name, {})
        seconds = duration(run.seconds[name]) if name in run.seconds and summary else "-"
        rows.append([name, _tokens(stage), seconds, *_losses(summary)])
    measuring = run.report.get("seconds")
    rows.append(["evaluation", "-", "-" if measuring is None else duration(measuring), "-", "-"])
    config, env = run.config, run.env
    layers = run.plan.get("layers") or run.report.get("converted") or []
    total = run.report.get("layers")
    of = f"{len(layers)} of {total}" if total else str(len(layers))
    words = [
        f"{of} layers of {config.teacher.source} became {config.student.mixer}: {', '.join(map(str, layers))}.",
        f"Windows of {config.data.window} tokens, seed {config.seed}, text from {', '.join(config.data.sources)}.",
    ]
    if env:
        words.append(
            f"On {env.get('machine', '?')} with {env.get('threads', '?')} threads, torch {env.get('torch', '?')},"
            f" ssmorph {env.get('ssmorph', '?')}."
        )
    head = ("stage", "tokens", "time", "first", "last")
    note = (
        "First and last: the loss of a trained stage; of calibration the layers' mean error, as copied and as fitted."
    )
    return join([*map(paragraph, words), table("Stages", head, rows), paragraph(note, "lead")])


def _tokens(stage: Stage) -> str:
    return str(stage.tokens) if isinstance(stage, CalibrateStage | TrainStage) else "-"


def _losses(summary: dict[str, Any]) -> list[str]:
    if "first_loss" in summary:
        return [number(summary["first_loss"], 3), number(summary["last_loss"], 3)]
    fits = summary.get("fits")
    if fits:
        return [number(sum(f[key] for f in fits) / len(fits), 3) for key in ("error_copy", "error")]
    return ["-", "-"]


def losses(run: RunFiles) -> Html | None:
    """One plot per trained stage, from metrics.jsonl."""
    by_stage: dict[str, list[dict[str, Any]]] = {}
    for record in run.metrics:
        by_stage.setdefault(record["stage"], []).append(record)
    plots = []
    for name, records in by_stage.items():
        lines: list[Series] = [
            ("mean" if "layers" in records[0] else "loss", [(r["step"], r["loss"]) for r in records])
        ]
        layers = records[0].get("layers", {})
        last = records[-1].get("layers", {})
        chosen = sorted(layers, key=lambda i: last.get(i, math.inf))
        # all of thirty layers would be one stroke
        for word, layer in zip(("best", "worst"), (chosen[0], chosen[-1]) if chosen else (), strict=False):
            points = [(r["step"], r["layers"][layer]) for r in records]
            lines.append((f"{word}: layer {layer}", points))
        plots.append(line_plot(f"{name}: loss by step", "step", "loss", lines))
    return figures(plots) if plots else None


def alignment(run: RunFiles) -> Html | None:
    """Errors of every layer after every stage, and how much goes with the state."""
    measured = run.report.get("alignment")
    if not measured:
        return None
    layers, rows = measured["layers"], measured["stages"]
    mixer = line_plot(
        "Each mixer against its attention on the teacher's inputs; 1 is attention removed", "layer",
        "relative squared error", [(r["stage"], list(zip(layers, r["mixer"], strict=True))) for r in rows], log=True,
    )  # fmt: skip
    stream = line_plot(
        "Behind every layer on the student's own inputs", "layer", "|student - teacher| / |teacher|",
        [(r["stage"], list(enumerate(r["stream"]))) for r in rows], log=True,
    )  # fmt: skip
    shares = measured["state_share"]
    cells = [
        [str(layer), *(number(r["mixer"][i], 3) for r in rows), number(shares[i], 3)] for i, layer in enumerate(layers)
    ]
    head = ("layer", *(r["stage"] for r in rows), "state's share")
    words = (
        f"On {measured['tokens']} held-out tokens. A stage's error is what it left; final is after the last."
        " The state's share is how much of a mixer's output changes where its state forgets everything."
    )
    return join([paragraph(words), figures([mixer, stream]), details("All numbers", table("Alignment", head, cells))])


def matrices(run: RunFiles) -> Html | None:
    """Best, median and worst head as pictures, and the errors of all."""
    measured = run.report.get("matrices")
    if not measured:
        return None
    pictures = []
    for head in measured["heads"]:
        where = f"{head['name']}: layer {head['layer']}, head {head['head']}, error {number(head['error'], 3)}"
        sides = "".join(
            f"<div>{map_image(head[side], label + ', ' + where)}<span>{label}</span></div>"
            for side, label in (("teacher", "teacher's attention"), ("student", "student's mixing matrix"))
        )
        pictures.append(figure(Html(f'<div class="pair">{sides}</div>'), text(where)))
    errors = measured["errors"]
    rows = [[layer, *(number(f(e), 3) for f in (min, _median, max))] for layer, e in errors.items()]
    words = (
        "A row reads, a column is read; the first token is top left. Each picture has its own scale, and shows the"
        " square root, since attention is concentrated. Blue is positive, orange negative (attention has none)."
    )
    note = "Error: at the matrix's best scale, 0 is equal, 1 has nothing in common. Pictures at reduced resolution."
    numbers = details("Errors of all layers", table("Heads' errors", ("layer", "best", "median", "worst"), rows))
    return join([paragraph(words), paragraph(note), figures(pictures, "three"), numbers])


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def recipe(run: RunFiles) -> Html | None:
    """config.yaml, folded."""
    return details("config.yaml", Html(f"<pre>{text(run.recipe)}</pre>"))
