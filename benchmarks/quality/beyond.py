"""A state against a window of the same bytes, both trained on the same tokens, where a window cannot help.

`python -m benchmarks.quality.beyond` converts SmolLM2-135M (15, 22 and 30 of 30 layers) to `windowed_mamba2` and to
`window` (E: the bytes of the former; W: its window alone), and all layers with a few heads kept whole, whose keys and
values E then has in bytes too, as they are after 1024 tokens. Measured are perplexity and KL by position in held-out
windows of 4096, and retrieval from further away than any window reaches. `--table` prints what is there, `--only
PREFIX...` picks some, `--of RUN_DIR` measures any finished run in the same way.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from .conversions import Converted, converted, keep, kept, opened

RECIPE = Path("configs/smollm2/135m-demo.yaml")
LAYERS = ("all", "uniform-22", "uniform-15")
BUDGET, SEED, WINDOW, RATE = 100_000, 0, 1024, 3e-4
# a third of the budget calibrates
SHARES = ("stages.calibrate.tokens=1000", "stages.logits.tokens=2000")
# tokens of keys and values as large as a window of 64 and 64 prototypes
EQUAL = 97
# the 8 foremost heads of this model read 7 of its 90 key/value heads. With these, all layers hold as much as 168 tokens
# of keys and values after 1024 tokens, where retrieval is asked; the rival has 5 % more. After 4096 it would be 407
HEADS, RIVAL_OF_HEADS = 8, 177
MIXERS = {
    "state": ("student.mixer=windowed_mamba2",),
    "E": ("student.mixer=window", f"student.window={EQUAL}"),
    "W": ("student.mixer=window",),
    "heads": ("student.mixer=windowed_mamba2", f"student.heads=retrieval-{HEADS}"),
    "E-heads": ("student.mixer=window", f"student.window={RIVAL_OF_HEADS}"),
}
# each of the others at all of LAYERS
ONLY = {"W": ("uniform-15",), "heads": ("all",), "E-heads": ("all",)}
TITLES = {
    "state": "**`windowed_mamba2`**: 64 tokens, 64 prototypes",
    "E": f"E: `window` of {EQUAL} tokens",
    "W": "W: `window` of 64 tokens",
    "heads": "**the same, 7 of 90 key/value heads whole**",
    "E-heads": f"E of these after 1024 tokens: `window` of {RIVAL_OF_HEADS}",
}
LONG, LONG_TOKENS = 4096, 32_768
EDGES = (0, 96, 512, 1024, 2048, 4095)
TASKS, LENGTHS, DEPTH, PROBES = ("needle", "multi-key", "copying"), (1024,), 0.1, 32


class Run(NamedTuple):
    """One conversion."""

    mixer: str
    layers: str

    @property
    def name(self) -> str:
        """As its result is called."""
        return f"beyond-{self.mixer}-{self.layers}-{BUDGET // 1000}k-seed{SEED}"


def runs() -> list[Run]:
    """All of them."""
    return [Run(mixer, layers) for layers in LAYERS for mixer in MIXERS if layers in ONLY.get(mixer, LAYERS)]


def perform(run: Run) -> None:
    """Converts and measures."""
    changes = [*MIXERS[run.mixer], *SHARES, f"student.layers={run.layers}", f"budget={BUDGET}", f"seed={SEED}"]
    done = converted(run.name, RECIPE, [*changes, f"data.window={WINDOW}", f"stages.logits.optim.lr={RATE}"])
    if kept("beyond-teacher") is None:
        keep("beyond-teacher", {"retrieval": retrieval(done, done.teacher)})
    result = {
        **run._asdict(),
        "budget": BUDGET,
        "seed": SEED,
        **positions(done),
        "retrieval": retrieval(done, done.student),
    }
    keep(run.name, {**result, "cpu_minutes": round(done.cpu_minutes, 1)})


def positions(done: Converted) -> dict[str, Any]:
    """Perplexity over the teacher's and KL, of everything and between the edges, on trained and untrained domains."""
    from ssmorph.stages.evaluate import heldout_sets
    from ssmorph.stages.scores import Candidate, Scores, score
    from ssmorph.stages.suite import suite_named

    parts = [
        score(done.teacher, [Candidate("hybrid", done.student)], windows_WL)
        for _, windows_WL in heldout_sets(done.data, LONG, suite_named("short", LONG_TOKENS, LONG))
    ]
    teacher, hybrid = (Scores.merged([part[name] for part in parts]) for name in ("teacher", "hybrid"))
    rows = []
    for start, end in [(0, LONG - 1), *pairwise(EDGES)]:
        row, base = hybrid.summary(start, end), teacher.summary(start, end)
        rows.append({"from": start, "to": end, "ratio": row["perplexity"] / base["perplexity"], "kl": row["kl"]})
    return {"positions": rows, "long_windows": hybrid.windows}


def retrieval(done: Converted, model: Any) -> dict[str, float]:
    """Accuracy of each task and length, the fact at a tenth of the text."""
    from ssmorph.stages.probes import make_task
    from ssmorph.stages.retrieval import accuracy, filler_of
    from ssmorph.stages.scores import Candidate

    filler_L = filler_of(done.data)
    return {
        f"{task} {length}": accuracy(
            Candidate("model", model), make_task(task, done.tokenizer, filler_L, length, DEPTH, PROBES, SEED)
        )
        for task in TASKS
        for length in LENGTHS
    }


def main() -> None:
    """The runs that are missing, then the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--only", nargs="+", default=[""])
    parser.add_argument("--of", type=Path)
    arguments = parser.parse_args()
    if arguments.of is not None:
        done = opened(arguments.of)
        row = {**positions(done), "retrieval": retrieval(done, done.student)}
        print_row(str(arguments.of), row)
        return
    for run in [] if arguments.table else runs():
        if kept(run.name) is None and f"{run.mixer}-{run.layers}".startswith(tuple(arguments.only)):
            print(run.name, flush=True)
            perform(run)
    for run in runs():
        print_row(run.name, kept(run.name))
    print_row("beyond-teacher", kept("beyond-teacher"))


def print_row(name: str, result: dict[str, Any] | None) -> None:
    """A line of ratios and KLs by position, and a line of retrieval."""
    if result is None:
        return
    print(name)
    parts = [f"{r['from']}-{r['to']}: {r['ratio']:.3f}, {r['kl']:.3f}" for r in result.get("positions", [])]
    print("  x teacher, KL  " + "   ".join(parts))
    print("  retrieval      " + "   ".join(f"{task}: {share:.0%}" for task, share in result["retrieval"].items()))


if __name__ == "__main__":
    main()
