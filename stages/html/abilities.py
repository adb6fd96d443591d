"""Sections on what the hybrid can do: retrieval, generation, decoding."""

from __future__ import annotations

from typing import Any

from .elements import NAMES, Html, figures, join, number, paragraph, percent, size, table, text
from .plots import line_plot
from .run_files import RunFiles

FULL = (
    "Not measured: needle, multi-key, key-value and copying by length and depth. `ssmorph eval RUN --suite full` does."
)


def retrieval(run: RunFiles) -> Html | None:
    """Key-value questions over distance, then every task by length and depth."""
    parts = []
    rows = run.report.get("retrieval") or []
    if rows:
        names = list(rows[0]["models"])
        cells = [[str(r["distance"]), *(percent(r["models"][n]) for n in names)] for r in rows]
        guess = percent(rows[0]["chance"])
        caption = f"Key-value questions by distance in tokens, {rows[0]['probes']} each; guessing {guess}"
        parts.append(table(caption, ("distance", *(NAMES.get(n, n) for n in names)), cells))
        if len(rows) > 1:
            lines = [(NAMES.get(n, n), [(r["distance"], 100 * r["models"][n]) for r in rows]) for n in names]
            parts.append(figures([line_plot("Right answers by distance", "tokens between", "right (%)", lines)]))
    tasks = run.report.get("tasks") or []
    if tasks:
        parts.append(_tasks(tasks))
    if not parts:
        return None
    return join(parts if tasks else [*parts, paragraph(FULL, "missing")])


def _tasks(tasks: list[dict[str, Any]]) -> Html:
    names = list(tasks[0]["models"])
    cells = [
        [f"{r['task']}, {r['length']} tokens, depth {r['depth']:g}", *(percent(r["models"][n]) for n in names)]
        for r in tasks
    ]
    caption = f"Retrieval by length and depth (0: the beginning), {tasks[0]['probes']} questions each, guessing 25 %"
    plots = []
    for task in dict.fromkeys(r["task"] for r in tasks):
        lines = []
        for name in names:
            by_length: dict[int, list[float]] = {}
            for r in tasks:
                if r["task"] == task:
                    by_length.setdefault(r["length"], []).append(100 * r["models"][name])
            lines.append((NAMES.get(name, name), [(n, sum(v) / len(v)) for n, v in by_length.items()]))
        plots.append(line_plot(f"{task}: right answers, mean over depths", "length", "right (%)", lines))
    head = ("task", *(NAMES.get(n, n) for n in names))
    return join([figures(plots), table(caption, head, cells)])


def generation(run: RunFiles) -> Html | None:
    """Greedy continuations beside the teacher's, with their statistics."""
    measured = run.report.get("generation")
    if not measured:
        return None
    rows = [
        [NAMES.get(n, n), number(m["length"], 1), percent(m["ended"]), number(m["distinct_1"]), number(m["distinct_2"]),
         percent(m["repeated_4"]), number(m["teacher_nll"])]
        for n, m in measured["models"].items()
    ]  # fmt: skip
    head = ("model", "length", "ended", "distinct-1", "distinct-2", "repeated 4-grams", "teacher's nats a token")
    words = (
        f"Greedy, at most {measured['new_tokens']} tokens after each of {len(measured['texts'])} held-out beginnings."
        " Ended: wrote its end-of-text token. The last column is what the teacher makes of each text."
    )
    names = list(measured["models"])
    articles = "".join(
        f'<article><h4>beginning</h4><pre>{text(row["prompt"])}</pre><div class="two">'
        + "".join(f"<div><h4>{text(NAMES.get(n, n))}</h4><pre>{text(row[n])}</pre></div>" for n in names)
        + "</div></article>"
        for row in measured["texts"]
    )
    texts = Html(f'<div class="texts">{articles}</div>')
    return join([paragraph(words), table("Statistics of the texts", head, rows, strong="hybrid"), texts])


def decoding(run: RunFiles) -> Html | None:
    """Tokens per second and bytes of cache by context."""
    measured = run.report.get("decode")
    if not measured:
        return None
    names = list(measured)
    cells = [
        [
            str(int(row[0]["context"])),
            *(s for c in row for s in (number(c["tokens_per_second"], 1), size(c["cache_bytes"]))),
        ]
        for row in zip(*measured.values(), strict=True)
    ]
    head = ("context", *(f"{n}{unit}" for n in names for unit in (": tokens/s", ": cache")))
    speeds = [(n, [(c["context"], c["tokens_per_second"]) for c in cs]) for n, cs in measured.items()]
    caches = [(n, [(c["context"], c["cache_bytes"] / 2**20) for c in cs]) for n, cs in measured.items()]
    speed = line_plot("Speed of decoding, batch 1", "context in tokens", "tokens/s", speeds)
    memory = line_plot("Memory of the cache", "context in tokens", "MiB", caches)
    return join([figures([speed, memory]), table("Decoding with a synthetic cache", head, cells)])
