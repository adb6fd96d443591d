"""Pieces of HTML: every text is escaped here, so that sections cannot forget it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import NewType

# a string that is HTML already
Html = NewType("Html", str)
Cell = str | Html

NAMES = {
    "teacher": "teacher",
    "hybrid": "hybrid",
    "copy": "copy, untrained",
    "removed": "attention removed",
    "own_window": "W: the layer's own window alone",
    "window": "E: window of equal bytes, untrained",
    "own_window_trained": "W, trained as the hybrid was",
    "window_trained": "E, trained as the hybrid was",
    "placed": "this placement, calibrated, untrained",
    "uniform": "uniform placement, calibrated, untrained",
    "silenced": "hybrid, states silenced",
    "narrowed": "hybrid, kept attention narrowed",
}


def text(value: object) -> Html:
    """Escaped text."""
    return Html(escape(str(value)))


def paragraph(words: str, kind: str = "") -> Html:
    """One paragraph."""
    return Html(f'<p class="{kind}">{escape(words)}</p>' if kind else f"<p>{escape(words)}</p>")


def join(parts: Iterable[Html]) -> Html:
    """Pieces one after another."""
    return Html("\n".join(parts))


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], strong: str | None = None) -> Html:
    """A table that scrolls in its own box; the first column names the row, `strong` is the name of one to mark."""
    heads = "".join(f'<th scope="col">{escape(h)}</th>' for h in head)
    body = []
    for name, *cells in rows:
        mark = ' class="strong"' if name == strong else ""
        values = "".join(f"<td>{escape(c)}</td>" for c in cells)
        body.append(f'<tr{mark}><th scope="row">{escape(name)}</th>{values}</tr>')
    return Html(
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{heads}</tr></thead><tbody>{''.join(body)}</tbody>"
        "</table></div>"
    )


def figure(picture: Html, caption: Html) -> Html:
    """A picture with its caption."""
    return Html(f"<figure>{picture}<figcaption>{caption}</figcaption></figure>")


def figures(items: Iterable[Html], kind: str = "") -> Html:
    """Figures beside one another where there is room; `three` of a kind are made to fit into a row."""
    return Html(f'<div class="figures {kind}">{"".join(items)}</div>')


def details(summary: str, body: Html) -> Html:
    """Something that opens on a click."""
    return Html(f"<details><summary>{escape(summary)}</summary>{body}</details>")


def number(value: float | None, digits: int = 2) -> str:
    """A number for people: three significant digits where it is large, a dash where there is none."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    if abs(value) >= 10_000:
        return f"{value:.1e}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.{digits}f}"


def percent(value: float) -> str:
    """A share as percent."""
    return "not a number" if math.isnan(value) else f"{100 * value:.1f} %"


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 1:
        return "under 1 s"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def size(count: float) -> str:
    """Bytes as MiB."""
    return f"{count / 2**20:.1f} MiB"
