"""Line plots as inline SVG; colours come from the page's style, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from .elements import Html, figure, text

WIDTH, HEIGHT = 440, 270
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 40
COLOURS = 8

Series = tuple[str, Sequence[tuple[float, float]]]


def line_plot(title: str, x_name: str, y_name: str, series: Sequence[Series], log: bool = False) -> Html:
    """A figure of one or more lines; points that are no finite number (or not positive, with `log`) are left out."""
    kept = [(name, [p for p in points if _drawable(p, log)]) for name, points in series]
    everything = [p for _, points in kept for p in points]
    if not everything:
        return figure(Html(""), text(f"{title}: no finite number to draw."))
    scale = _Scale(everything, log)
    drawn = "".join(_line(scale, points, i) for i, (_, points) in enumerate(kept) if points)
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{scale.axes(x_name, y_name)}{drawn}</svg>"
    )
    keys = "".join(
        f'<span class="key"><i class="c{i % COLOURS}"></i>{escape(name)}</span>' for i, (name, _) in enumerate(kept)
    )
    lost = sum(len(points) for _, points in series) - len(everything)
    note = f"; {lost} points cannot be drawn, being 0 or no number" if lost else ""
    legend = f'<span class="keys">{keys}</span>' if len(kept) > 1 else ""
    return figure(Html(svg), Html(f"{escape(title + note)}{legend}"))


def _drawable(point: tuple[float, float], log: bool) -> bool:
    return all(math.isfinite(v) for v in point) and (not log or point[1] > 0)


def _line(scale: _Scale, points: Sequence[tuple[float, float]], index: int) -> str:
    placed = [(scale.x(x), scale.y(y)) for x, y in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in placed) if len(placed) <= 40 else ""
    return f'<g class="c{index % COLOURS}"><polyline points="{path}"/>{dots}</g>'


class _Scale:
    """From values to places in the picture."""

    def __init__(self, points: Sequence[tuple[float, float]], log: bool) -> None:
        self.log = log
        xs, ys = [x for x, _ in points], [self._value(y) for _, y in points]
        self.x_range = _widened(min(xs), max(xs), 0.0)
        low = min(ys) if log else min(0.0, *ys)
        self.y_range = _widened(low, max(ys), 0.05)

    def _value(self, y: float) -> float:
        return math.log10(y) if self.log else y

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return HEIGHT - BOTTOM - (self._value(value) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def axes(self, x_name: str, y_name: str) -> str:
        """Grid, numbers and names."""
        parts = []
        for value in self._y_ticks():
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="end" x="{LEFT - 6}" y="{y + 4:.1f}">{value:.3g}</text>')
        below = HEIGHT - BOTTOM + 16
        marks = ticks(*self.x_range)
        parts += [f'<text class="mid" x="{self.x(value):.1f}" y="{below}">{value:g}</text>' for value in marks]
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text class="mid name" x="{middle}" y="{HEIGHT - 6}">{escape(x_name)}</text>')
        half = (HEIGHT - BOTTOM + TOP) / 2
        turn = f'transform="rotate(-90 12 {half})"'
        parts.append(f'<text class="mid name" x="12" y="{half}" {turn}>{escape(y_name)}</text>')
        return "".join(parts)

    def _y_ticks(self) -> list[float]:
        low, high = self.y_range
        if not self.log:
            return ticks(low, high)
        whole = [10.0**k for k in range(math.ceil(low), math.floor(high) + 1)]
        if len(whole) > 2:
            return whole[:: max(1, len(whole) // 5)]
        decades = range(math.floor(low), math.ceil(high) + 1)
        return [m * 10.0**k for k in decades for m in (1, 2, 5) if low <= math.log10(m * 10.0**k) <= high]


def _widened(low: float, high: float, share: float) -> tuple[float, float]:
    room = (high - low) * share
    return (low, high + room) if high > low else (low - 0.5, high + 0.5)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between `low` and `high`."""
    raw = (high - low) / about
    base = 10 ** math.floor(math.log10(raw))
    step = next(base * m for m in (1, 2, 5, 10) if base * m >= raw)
    return [round(k * step, 12) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
