"""Draws what benchmarks/quality/results holds: `python -m benchmarks.quality.plot` writes docs/quality.svg.

Excess of log-perplexity over the teacher's against tokens, for each recipe at its best rate; the mean over seeds.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from ssmorph.stages.html.plots import Series, line_plot

from .study import LARGE, MIDDLE, RATES, SEEDS, TUNING, Run, best_rate

OUT = Path("docs/quality.svg")
COLOURS = ("#0b7285", "#c2255c", "#e8590c", "#5f3dc4", "#2b8a3e")
STYLE = (
    "text{font:11px sans-serif;fill:#555}.end{text-anchor:end}.mid{text-anchor:middle}.grid{stroke:#ccc}"
    "polyline{fill:none;stroke-width:2}"
    + "".join(f".c{i} polyline{{stroke:{c}}}.c{i} circle,.c{i} text{{fill:{c}}}" for i, c in enumerate(COLOURS))
)


def series() -> list[Series]:
    """A line for each recipe of which something is done: thousands of tokens, excess."""
    lines: list[Series] = []
    for recipe in RATES:
        rate = best_rate(recipe)
        points = []
        for budget in (TUNING, MIDDLE, LARGE) if rate is not None else ():
            done = [r for seed in SEEDS if rate and (r := Run(recipe, budget, rate, seed).result())]
            if done:
                points.append((budget / 1000, sum(math.log(r["ratio"]) for r in done) / len(done)))
        if points:
            lines.append((recipe, points))
    return lines


def main() -> None:
    """One SVG file that needs nothing else."""
    lines = series()
    page = line_plot("excess", "thousands of tokens", "log perplexity above the teacher's", lines, log=True)
    svg = re.search(r"<svg([^>]*)>(.*?)</svg>", str(page), re.S)
    assert svg is not None, "no run of the study is done"
    names = "".join(
        f'<g class="c{i}"><text x="430" y="{28 + 15 * i}" class="end">{name}</text></g>'
        for i, (name, _) in enumerate(lines)
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="660" height="405"{svg.group(1)}><style>{STYLE}</style>'
    OUT.write_text(f"{head}{svg.group(2)}{names}</svg>\n")
    print(f"{OUT}: " + ", ".join(name for name, _ in lines))


if __name__ == "__main__":
    main()
