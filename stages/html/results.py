"""Sections on closeness to the teacher: controls, domains, positions, who does the work, layers added, loyalty."""

from __future__ import annotations

from typing import Any

from ..verdict import same_bytes
from .elements import NAMES, Html, figures, join, number, paragraph, percent, table
from .plots import line_plot
from .run_files import RunFiles

COLUMNS = ("model", "KL (nats)", "top-1", "perplexity", "x teacher")


def _row(name: str, row: dict[str, Any], base: float) -> list[str]:
    return [name, number(row["kl"], 3), percent(row["top1"]), number(row["perplexity"]),
            number(row["perplexity"] / base)]  # fmt: skip


def controls(run: RunFiles) -> Html | None:
    """Teacher, hybrid and what it has to beat, on every held-out set."""
    parts = []
    for entry in run.report.get("text") or []:
        base = entry["models"]["teacher"]["perplexity"]
        rows = [_row(NAMES.get(n, n), row, base) for n, row in entry["models"].items()]
        tokens = entry["models"]["teacher"]["tokens"]
        caption = f"{entry['set']}, windows of {entry['window']}, {tokens} tokens"
        parts.append(table(caption, COLUMNS, rows, strong="hybrid"))
    if not parts:
        return None
    window, first = run.report["window_control"], run.report["text"][0]["models"]
    lead = (
        "KL and top-1 come first: adapting to a domain can hide damage in perplexity. Controls are at the same layers"
        " and untrained unless their name says more. A copy has the attention's own weights, before calibration."
    )
    notes = [paragraph(lead)]
    if "window" in first:
        tokens, sinks = window["tokens"], window["sinks"]
        notes.append(paragraph(f"E sees {tokens} tokens, {sinks} of them the first,{same_bytes(run.report)}."))
    window_alone = "own_window" in first
    absent = [n for n in ("copy", "removed", "window") if n not in first]
    if window_alone and "copy" in absent:
        absent.remove("copy")
        notes.append(paragraph("The copy is W: a state behind a window answers nothing before calibration."))
    if absent:
        notes.append(paragraph(f"Not measured: {', '.join(NAMES[n] for n in absent)}.", "missing"))
    if not window_alone:
        notes.append(paragraph("Not measured: W, since these mixers keep no window of their own.", "missing"))
    return join([*notes, *parts])


def domains(run: RunFiles) -> Html | None:
    """Every source apart, and the domain that is never trained on."""
    rows, bare = [], []
    for entry in run.report.get("text") or []:
        if not entry.get("by_source"):
            bare.append(entry["set"])
            continue
        untrained = "" if entry["set"] == "held-out documents" else " (never trained on)"
        for source, models in entry["by_source"].items():
            name = f"{source}{untrained}, {entry['window']}"
            rows.append(_row(name, models["hybrid"], models["teacher"]["perplexity"]))
    if not rows:
        return None
    note = [paragraph(f"Not measured by source: {', '.join(bare)}.", "missing")] if bare else []
    return join([table("The hybrid by source of text, and window", ("source, window", *COLUMNS[1:]), rows), *note])


def positions(run: RunFiles) -> Html | None:
    """KL and perplexity in each quarter of the window."""
    plots = []
    for entry in run.report.get("text") or []:
        models = {n: m for n, m in entry["models"].items() if n in ("hybrid", "window", "own_window")}
        if not all(m.get("by_position") for m in models.values()):
            continue
        title = f"{entry['set']}, windows of {entry['window']}"
        lines = [(NAMES[n], [(q["to"], q["kl"]) for q in m["by_position"]]) for n, m in models.items()]
        plots.append(line_plot(f"KL, {title}", "up to token", "KL (nats)", lines))
        base = entry["models"]["teacher"]["by_position"]
        ratios = [
            (NAMES[n], [(q["to"], q["perplexity"] / b["perplexity"]) for q, b in pairs])
            for n, pairs in ((n, list(zip(m["by_position"], base, strict=True))) for n, m in models.items())
        ]
        plots.append(line_plot(f"Perplexity over the teacher's, {title}", "up to token", "x teacher", ratios))
    return figures(plots) if plots else None


def work(run: RunFiles) -> Html | None:
    """The hybrid with its states silenced, and with its kept attention narrowed."""
    measured = run.report.get("work")
    if not measured:
        return None
    models, narrow = measured["models"], measured["narrow"]
    base = models["teacher"]["perplexity"]
    rows = [_row(NAMES.get(n, n), row, base) for n, row in models.items() if n != "teacher"]
    cost = models["silenced"]["kl"] - models["hybrid"]["kl"]
    lead = (
        f"Silenced, no state of a converted layer remembers anything; windows and kept heads work on. That costs"
        f" {number(cost, 3)} nats."
    )
    parts = [paragraph(lead)]
    if "narrowed" in models:
        more = models["narrowed"]["kl"] - models["hybrid"]["kl"]
        parts.append(paragraph(
            f"Narrowed, the {len(narrow['layers'])} kept layers see their last {narrow['tokens'] - narrow['sinks']}"
            f" tokens and the first {narrow['sinks']}. That costs {number(more, 3)} nats."
        ))  # fmt: skip
    else:
        parts.append(paragraph("Not measured: kept attention narrowed, since no layer keeps its attention.", "missing"))
    tokens = models["hybrid"]["tokens"]
    caption = f"Who does the work, {tokens} tokens in windows of {measured['window']}"
    return join([*parts, table(caption, COLUMNS, rows, strong="hybrid")])


def added(run: RunFiles) -> Html | None:
    """KL and agreement with only the first k layers converted."""
    rows = run.report.get("added")
    if not rows:
        return None
    start = [(0.0, 0.0)]
    kl = line_plot("KL as layers are added, from the first to the last", "layers converted", "KL (nats)",
                   [("KL", start + [(r["converted"], r["kl"]) for r in rows])])  # fmt: skip
    top = line_plot("Top-1 agreement as layers are added", "layers converted", "top-1 (%)",
                    [("top-1", [(0.0, 100.0)] + [(r["converted"], 100 * r["top1"]) for r in rows])])  # fmt: skip
    words = "The first layers of the plan are converted, the others have the teacher's attention again."
    cells = [[str(r["converted"]), number(r["kl"], 3), percent(r["top1"]), number(r["perplexity"])] for r in rows]
    numbers = table("Layers added", ("converted", *COLUMNS[1:4]), cells)
    return join([paragraph(words), figures([kl, top]), numbers])


def loyalty(run: RunFiles) -> Html | None:
    """Label, probability and rank."""
    rows = []
    for entry in run.report.get("text") or []:
        for name, row in entry["models"].items():
            if name != "teacher" and "rank" in row:
                label = f"{NAMES.get(name, name)}: {entry['set']}, {entry['window']}"
                rows.append([label, percent(row["top1"]), number(row["probability"], 3), number(row["rank"], 3)])
    if not rows:
        return None
    words = (
        "Label: how often the likeliest token is the teacher's. Probability: the mean of |p_teacher - p_model| of the"
        " teacher's likeliest token. Rank: Spearman's correlation over its ten likeliest tokens, 1 is the same order."
    )
    return join(
        [paragraph(words), table("Loyalty to the teacher", ("model, text", "label", "probability", "rank"), rows)]
    )
