"""What a token of training buys: our recipe against the peers', on one model, data and seed.

`python -m benchmarks.quality.study` runs what is missing and prints what is there; `--table` prints it alone,
`--recipes` runs some of them (for several processes at once). A run's result is a file under
benchmarks/quality/results; a run that was stopped goes on from its last checkpoint.

SmolLM2-135M, 15 of 30 layers, windows of 512. Each recipe's rate is chosen at 10k tokens (its results are there to
see), then used at 30k with two seeds; ours and the best peer go on to 100k, with 15 layers and with all.
Perplexity and KL on held-out documents.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .conversions import converted, keep, kept, scored

RECIPES = Path("configs/study")
# the rates tried first for the stage that trains on logits; peers train all weights with absolute steps
RATES = {
    "ours": (1e-4, 2e-4, 4e-4),
    "mohawk": (1e-4, 3e-4, 1e-3),
    "mambainllama": (1e-4, 3e-4, 1e-3),
    "matvlm": (3e-4, 1e-3, 3e-3),
    "radlads": (1e-4, 3e-4, 1e-3),
}
# while the best is the lowest or highest, one more is tried beyond it
STEP = {"ours": 2.0}
# what is no mixer is trained at this share of the rate; MaTVLM trains mixers alone
REST = {"ours": 1 / 3, "mohawk": 1.0, "mambainllama": 1.0, "radlads": 1.0}
# what each ingredient of ours is worth: the recipe without it
WITHOUT = {
    "calibration": ("stages=[{kind: surgery}, {kind: logits, tokens: 30000, batch: 1, checkpoint_every: 16}]",
                    "stages.logits.optim.warmup_percent=10", "stages.logits.optim.decay_percent=90"),
    "KL": ("stages=[{kind: surgery}, {kind: calibrate, tokens: 30000}]",),
    "refinement": ("stages.calibrate.refine_steps=0",),
    "the-rest": ("stages.logits.optim.rest_lr=0",),
    "own-inputs": ("stages.calibrate.inputs=teacher",),
    "output-decays": ("stages.calibrate.decay=distance",),
    "relative-steps": ("stages.logits.optim.kind=adamw",),
}  # fmt: skip
# what costs CPU and no tokens: ours with it, in layers spread evenly and in those that `student.layers=loo-15` found
MORE = {"500-steps": ("stages.calibrate.refine_steps=500", "stages.calibrate.refine_lr=0.004")}
FOUND = {"loo-15": "[5, 6, 7, 9, 12, 13, 15, 16, 21, 22, 25, 26, 27, 28, 29]"}
TUNING, SEEDS, MIDDLE, LARGE = 10_000, (0, 1), 30_000, 100_000
HELD_OUT = 8192


class Run(NamedTuple):
    """One conversion."""

    recipe: str
    budget: int
    rate: float
    seed: int
    layers: str = "uniform-15"
    without: str = ""
    more: str = ""

    @property
    def name(self) -> str:
        """As its files are called."""
        apart = "" if self.layers == "uniform-15" else f"-{self.layers}"
        apart += f"-without-{self.without}" if self.without else ""
        apart += f"-with-{self.more}" if self.more else ""
        return f"{self.recipe}{apart}-{self.budget // 1000}k-{self.rate:g}-seed{self.seed}"

    def result(self) -> dict[str, Any] | None:
        """What it came to, if it is done."""
        return kept(self.name)


def runs(recipes: Sequence[str]) -> Iterator[Run]:
    """Every run that can be named yet: the larger wait for the rates, the largest for the best peer."""
    for recipe in recipes:
        yield from (Run(recipe, TUNING, rate, 0) for rate in rates(recipe))
    yield from (
        Run(recipe, MIDDLE, rate, seed)
        for seed in SEEDS
        for recipe in recipes
        if (rate := best_rate(recipe)) is not None
    )
    for finalist in dict.fromkeys(("ours", best_peer() or "ours")):
        if finalist in recipes and (rate := best_rate(finalist)) is not None:
            yield from (Run(finalist, LARGE, rate, seed) for seed in SEEDS)
            yield Run(finalist, LARGE, rate, 0, "all")
    if "ours" in recipes:
        yield from leave_one_out()
        yield from longer()


def leave_one_out() -> Iterator[Run]:
    """Ours without each of its ingredients."""
    rate = best_rate("ours")
    if rate is not None:
        yield from (Run("ours", MIDDLE, rate, 0, without=ingredient) for ingredient in WITHOUT)


def longer() -> Iterator[Run]:
    """Ours with more steps of calibration on the same tokens."""
    rate = best_rate("ours")
    if rate is not None:
        yield from (Run("ours", LARGE, rate, 0, layers, more="500-steps") for layers in ("uniform-15", *FOUND, "all"))


def rates(recipe: str) -> list[float]:
    """The rates to try: the first three, and beyond them until the best lies inside."""
    tried = sorted(RATES[recipe])
    while True:
        results = {rate: Run(recipe, TUNING, rate, 0).result() for rate in tried}
        if None in results.values():
            return tried
        best = min(tried, key=lambda rate: results[rate]["kl"])  # type: ignore[index]
        if best not in (tried[0], tried[-1]):
            return tried
        step = STEP.get(recipe, 3.0)
        tried = sorted([*tried, float(f"{best / step if best == tried[0] else best * step:.2g}")])


def best_rate(recipe: str) -> float | None:
    """The rate of the lowest KL at the smallest budget, once all were tried."""
    results = [(Run(recipe, TUNING, rate, 0).result(), rate) for rate in rates(recipe)]
    return None if any(r is None for r, _ in results) else min((r["kl"], rate) for r, rate in results if r)[1]


def best_peer() -> str | None:
    """The peer of the lowest mean KL at 30k tokens, once all of them have run there."""
    means = {}
    for peer in RATES:
        rate = best_rate(peer)
        results = [] if peer == "ours" or rate is None else [Run(peer, MIDDLE, rate, s).result() for s in SEEDS]
        if results and all(results):
            means[peer] = sum(r["kl"] for r in results if r) / len(results)
    return min(means, key=means.__getitem__) if len(means) == len(RATES) - 1 else None


def perform(run: Run) -> None:
    """Converts and scores, then leaves the numbers alone."""
    changes = [*WITHOUT.get(run.without, ()), *MORE.get(run.more, ()), f"budget={run.budget}", f"seed={run.seed}"]
    changes.append(f"student.layers={FOUND.get(run.layers, run.layers)}")
    if run.without != "KL":
        changes.append(f"stages.logits.optim.lr={run.rate}")
        if run.recipe in REST and run.without != "the-rest":
            changes.append(f"stages.logits.optim.rest_lr={run.rate * REST[run.recipe]:.3g}")
    done = converted(run.name, RECIPES / f"{run.recipe}.yaml", changes)
    keep(run.name, {**run._asdict(), **scored(done, tokens=HELD_OUT)})


def main() -> None:
    """The runs that are missing, then the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--recipes", nargs="+", choices=RATES, default=list(RATES))
    arguments = parser.parse_args()
    speeds: list[float] = []
    while not arguments.table:
        todo = [run for run in runs(arguments.recipes) if run.result() is None]
        if not todo:
            break
        left = sum(run.budget for run in todo) / (sum(speeds) / len(speeds)) / 60 if speeds else math.nan
        print(f"{todo[0].name}: {len(todo)} runs to do, about {left:.0f} min", flush=True)
        started = time.monotonic()
        perform(todo[0])
        speeds.append(todo[0].budget / (time.monotonic() - started))
    print_table()


def print_table() -> None:
    """What is there: a row for each run."""
    for run in runs(list(RATES)):
        result = run.result()
        if result is not None:
            numbers = f"x teacher {result['ratio']:8.3f}  KL {result['kl']:6.3f}  top-1 {result['top1']:.3f}"
            print(f"{run.name:32} {numbers}  {result['cpu_minutes']:.1f} CPU-minutes")


if __name__ == "__main__":
    main()
