"""Draws report.json in the terminal, and the loss curves. Measures nothing itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .verdict import same_bytes, verdict

NAMES = {
    "teacher": "teacher",
    "hybrid": "hybrid",
    "copy": "control: copy, untrained",
    "removed": "control: attention removed",
    "own_window": "control: the layer's own window",
    "window": "control: window of equal bytes",
    "own_window_trained": "control: its own window, trained alike",
    "window_trained": "control: window of equal bytes, trained alike",
    "placed": "control: this placement, calibrated",
    "uniform": "control: uniform placement, calibrated",
}


def print_report(report: dict[str, Any], console: Console) -> None:
    """Teacher, hybrid and controls; then retrieval and decoding; then the window and the warnings."""
    for text in report["text"]:
        console.print(_text_table(text))
    if report["retrieval"]:
        console.print(_retrieval_table(report["retrieval"]))
    console.print(_decode_table(report["decode"]))
    for line in against_window(report):
        console.print(line)
    for warning in verdict(report):
        console.print(f"[bold]warning, {warning.name}:[/bold] {escape(warning.text)}")


def _text_table(text: dict[str, Any]) -> Table:
    base = text["models"]["teacher"]["perplexity"]
    table = Table(
        title=f"{text['set']}, windows of {text['window']} tokens, {text['models']['teacher']['tokens']} tokens"
    )
    for column in ("model", "perplexity", "x teacher", "KL (nats)", "top-1 agreement"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, row in text["models"].items():
        ratio = row["perplexity"] / base
        table.add_row(
            NAMES[name], _short(row["perplexity"]), _short(ratio), f"{row['kl']:.3f}", f"{100 * row['top1']:.1f} %"
        )
    return table


def _retrieval_table(rows: list[dict[str, Any]]) -> Table:
    names = list(rows[0]["models"])
    table = Table(title=f"key-value retrieval, share right of {rows[0]['probes']} (chance {rows[0]['chance']:.2f})")
    table.add_column("tokens between", justify="right")
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(str(row["distance"]), *(f"{row['models'][n]:.2f}" for n in names))
    return table


def _decode_table(decode: dict[str, list[dict[str, float]]]) -> Table:
    table = Table(title="decoding, batch 1, synthetic cache")
    table.add_column("context", justify="right")
    for name in decode:
        table.add_column(f"{name} tokens/s", justify="right")
        table.add_column(f"{name} cache", justify="right")
    for cells in zip(*decode.values(), strict=True):
        row = [f"{int(cells[0]['context'])}"]
        for cell in cells:
            row += [f"{cell['tokens_per_second']:.1f}", f"{cell['cache_bytes'] / 2**20:.1f} MiB"]
        table.add_row(*row)
    return table


def tasks_table(report: dict[str, Any]) -> Table:
    """Tasks of lm-eval: teacher, hybrid and their difference, with standard errors."""
    limit = "" if report["limit"] is None else f", at most {report['limit']} documents each"
    table = Table(title=f"{escape(str(report['suite']))}, lm-eval {report['lm_eval']}{limit}")
    for column in ("task", "metric", "documents", "chance", "teacher", "hybrid", "difference"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for row in report["rows"]:
        chance = "" if row["chance"] is None else f"{row['chance']:.2f}"
        cells = (_with_error(**row[name]) for name in ("teacher", "hybrid"))
        table.add_row(
            escape(row["task"]),
            escape(row["metric"]),
            str(row["documents"]),
            chance,
            *cells,
            f"{row['difference']:+.3f}",
        )
    return table


def _with_error(value: float, stderr: float | None) -> str:
    return f"{value:.3f}" if stderr is None else f"{value:.3f} ± {stderr:.3f}"


def against_window(report: dict[str, Any]) -> list[str]:
    """Whether the hybrid beats the window of equal bytes, and where."""
    lines = []
    for text in report["text"]:
        models = text["models"]
        if "window" not in models:
            continue
        ratio = models["hybrid"]["perplexity"] / models["window"]["perplexity"]
        word = "better than" if ratio < 1 else "worse than"
        lines.append(
            f"On {text['set']} ({text['window']}) the hybrid's perplexity is {abs(ratio - 1):.1%} {word} an untrained"
            f" attention window of {report['window_control']['tokens']} tokens{same_bytes(report)}."
        )
    for row in report["retrieval"]:
        if "window" in row["models"]:
            gap = row["models"]["hybrid"] - row["models"]["window"]
            lines.append(f"Retrieval over {row['distance']} tokens: hybrid {gap:+.2f} against that window.")
    return lines


def _short(value: float) -> str:
    return f"{value:.3g}" if value >= 1000 else f"{value:.2f}"


def draw_losses(metrics: Path, folder: Path) -> list[Path]:
    """One PNG per gradient stage: the mean loss and, where there are several, every layer's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    stages: dict[str, list[dict[str, Any]]] = {}
    for line in metrics.read_text().splitlines():
        record = json.loads(line)
        stages.setdefault(record["stage"], []).append(record)
    drawn = []
    for stage, records in stages.items():
        figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
        steps = [r["step"] for r in records]
        for layer in records[0].get("layers", {}):
            axes.plot(steps, [r["layers"][layer] for r in records], linewidth=0.7, alpha=0.6, label=f"layer {layer}")
        axes.plot(steps, [r["loss"] for r in records], color="black", linewidth=1.5, label="mean")
        axes.set(xlabel="step", ylabel="loss", title=stage)
        axes.legend(fontsize=6, ncols=3)
        drawn.append(folder / f"loss-{stage}.png")
        figure.savefig(drawn[-1], dpi=120)
        pyplot.close(figure)
    return drawn
