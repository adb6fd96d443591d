"""Writes the tables of docs/quality.md from benchmarks/quality/results: `python -m benchmarks.quality.tables`.

A table stands between `<!-- NAME -->` and `<!-- end -->`; the words around them are written by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import linear_regression
from typing import Any

from . import beyond, calibration, heads, placement, study
from .conversions import kept

PAGE = Path("docs/quality.md")
STRETCHES = list(pairwise(beyond.EDGES))
TITLES = {
    "ours": "ours, `mamba2`", "mohawk": "MOHAWK", "mambainllama": "The Mamba in the Llama", "matvlm": "MaTVLM",
    "radlads": "RADLADS",
}  # fmt: skip


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def rates() -> str:
    """Every rate that was tried at the smallest budget."""
    rows = []
    for recipe in study.RATES:
        tried = {rate: study.Run(recipe, study.TUNING, rate, 0).result() for rate in study.rates(recipe)}
        done = {rate: r for rate, r in tried.items() if r is not None}
        best = min(done, key=lambda rate: done[rate]["kl"], default=None)
        bold = {rate: "**" if rate == best and len(done) == len(tried) else "" for rate in done}
        cells = (f"{bold[r]}{r:g}: {done[r]['ratio']:.3g}, {done[r]['kl']:.3f}{bold[r]}" for r in done)
        missing = len(tried) - len(done)
        rows.append(
            [f"{TITLES[recipe]} (`{recipe}.yaml`)", "; ".join(cells) + (f"; {missing} not run yet" if missing else "")]
        )
    return table(("recipe", "rate: x teacher, KL after 10k tokens"), rows)


def recipes() -> str:
    """Each recipe at its best rate, by budget; the mean of the seeds that are there."""
    columns = [(study.MIDDLE, "uniform-15"), (study.LARGE, "uniform-15"), (study.LARGE, "all")]
    rows = []
    for recipe in study.RATES:
        rate, cells = study.best_rate(recipe), []
        for budget, layers in columns:
            runs = [study.Run(recipe, budget, rate, seed, layers) for seed in study.SEEDS] if rate else []
            done = [r for run in runs if (r := run.result()) is not None]
            cells.append(_mean(done))
        rows.append([TITLES[recipe], *cells])
    head = ["recipe", *(f"{budget // 1000}k tokens, {layers}" for budget, layers in columns)]
    return table(head, rows)


def _mean(done: list[dict[str, Any]]) -> str:
    if not done:
        return "not run"
    excess, kl = (sum(values) / len(done) for values in ([math.log(r["ratio"]) for r in done], [r["kl"] for r in done]))
    ratio = math.exp(excess)
    seeds = f" ({len(done)} seeds)" if len(done) > 1 else ""
    return f"{ratio:{'.2f' if ratio < 10 else '.3g'}}, {kl:.3f}{seeds}"


def steps() -> str:
    """Ours with more gradient steps of calibration, and as it is, where it ran on these layers."""
    rows = []
    for run in study.longer():
        both = [
            [r for seed in study.SEEDS if (r := one._replace(seed=seed).result())]
            for one in (run._replace(more=""), run)
        ]
        rows.append([run.layers, *map(_mean, both)])
    return table(("converted", "126 steps", "500 steps"), rows)


def overtaking() -> str:
    """When pure Mamba-2 would reach the trained window E, if its KL went on falling as a power of the tokens."""
    rate, points = study.best_rate("ours"), []
    for budget in (study.TUNING, study.MIDDLE, study.LARGE) if rate else ():
        done = [r["kl"] for seed in study.SEEDS if (r := study.Run("ours", budget, rate or 0, seed).result())]
        if done:
            points.append((math.log(budget), math.log(sum(done) / len(done))))
    window = kept(beyond.Run("E", "uniform-15").name)
    head = ("KL of ours, `mamba2`", "falls as", "E at 100k tokens, first 512 of a text", "would reach E at")
    if len(points) < 2 or window is None:
        return table(head, [("not run", *["-"] * 3)])
    near = [row for row in window["positions"] if row["to"] <= 512]
    target = sum(r["kl"] * (r["to"] - r["from"]) for r in near) / 512
    slope, start = linear_regression(*zip(*points, strict=True))
    tokens = math.exp((math.log(target) - start) / slope)
    falls = ", ".join(f"{math.exp(kl):.3f} ({math.exp(size) / 1000:.0f}k)" for size, kl in points)
    return table(
        head, [(falls, f"tokens^{slope:.2f}", f"{target:.3f}", f"{float(f'{tokens:.1g}') / 1e6:,.0f} million tokens")]
    )


def ingredients() -> str:
    """Ours without each of its ingredients."""
    rate = study.best_rate("ours")
    whole = study.Run("ours", study.MIDDLE, rate, 0).result() if rate else None
    rows = [["nothing", _mean([whole] if whole else [])]]
    rows += [
        [run.without.replace("-", " "), _mean([r] if (r := run.result()) else [])] for run in study.leave_one_out()
    ]
    return table(("left out", "x teacher, KL after 30k tokens"), rows)


def states() -> str:
    """Windows with and without a state."""
    rows = []
    for run in beyond.runs():
        result = kept(run.name)
        if result is not None:
            stretches = [_pair(row) for row in result["positions"] if (row["from"], row["to"]) in STRETCHES]
            found = [f"{result['retrieval'][f'{task} {n}']:.0%}" for task in beyond.TASKS for n in beyond.LENGTHS]
            rows.append([run.layers, beyond.TITLES[run.mixer], *stretches, *found])
    teacher = kept("beyond-teacher")
    if teacher is not None:
        found = [f"{teacher['retrieval'][f'{task} {n}']:.0%}" for task in beyond.TASKS for n in beyond.LENGTHS]
        rows.append(["", "teacher", *("1, 0" for _ in STRETCHES), *found])
    tasks = [f"{task}, {n}" for task in beyond.TASKS for n in beyond.LENGTHS]
    return table(("converted", "layer", *(f"tokens {a} to {b}" for a, b in STRETCHES), *tasks), rows)


def _pair(row: dict[str, float] | None) -> str:
    return "not run" if row is None else f"{row['ratio']:.3f}, {row['kl']:.3f}"


def layers(mixer: str = "mamba2") -> str:
    """Every placement of a mixer that has run."""
    done = [(run, result) for run in placement.all_runs(mixer) if (result := run.result()) is not None]
    asked = [f"{d} tokens away" for d in placement.DISTANCES]
    if mixer != "mamba2":
        asked = [f"{task}, {placement.LENGTH}" for task in placement.TASKS]
    rows = []
    for run, result in done:
        attention = ", ".join(str(i) for i in range(30) if i not in result["converted"])
        pairs = [_pair(result[stage]) for stage in ("calibrated", "trained")]
        rows.append([run.strategy, attention, *pairs, *_shares(result["trained"]), f"{result['cpu_minutes']}"])
    if done:
        rows.append(["", "all: the teacher", "1, 0", "1, 0", *_shares(done[0][1]["teacher"]), ""])
    head = ("placement", "keeps attention in", "calibrated: x teacher, KL", "trained")
    return table((*head, *asked, "CPU minutes"), rows)


def window_layers() -> str:
    """The same where layers keep a window with a state behind it."""
    return layers("windowed_mamba2")


def _shares(row: dict[str, Any]) -> list[str]:
    return [f"{share:.0%}" for share in row["retrieval"].values()]


def tokens() -> str:
    """Calibration alone, by layers and tokens."""
    rows = [
        [chosen, *(_pair(kept(calibration.name(chosen, size))) for size in calibration.TOKENS)]
        for chosen in calibration.LAYERS
    ]
    return table(("converted", *(f"{size // 1000}k tokens" for size in calibration.TOKENS)), rows)


def some_heads() -> str:
    """A few heads kept, calibrated."""
    rows = []
    for choice in heads.CHOICES:
        result = kept(f"heads-{choice}")
        if result is not None:
            rows.append([choice, *_heads_row(result["student"])])
            last = result["teacher"]
    rows.append(["all: the teacher", *_heads_row(last)])
    return table(("kept heads, of 135", "x teacher, KL", "values named", "cache"), rows)


def _heads_row(row: dict[str, float]) -> list[str]:
    return [_pair(row), f"{row['named']:.3f}", f"{row['cache_bytes'] / 2**20:.1f} MiB"]


TABLES: dict[str, Callable[[], str]] = {
    "rates": rates, "recipes": recipes, "ingredients": ingredients, "states": states, "layers": layers,
    "window-layers": window_layers, "tokens": tokens, "heads": some_heads, "overtaking": overtaking,
    "steps": steps,
}  # fmt: skip


def filled(page: str) -> str:
    """The page with every table as the results have it."""
    for name, make in TABLES.items():
        before, _, rest = page.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        assert end, f"the page has no place for the table {name}"
        page = f"{before}<!-- {name} -->\n{make()}\n{end}{after}"
    return page


def main() -> None:
    """Rewrites the page's tables."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{PAGE}: {len(TABLES)} tables")


if __name__ == "__main__":
    main()
