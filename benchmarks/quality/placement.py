"""Which layers to convert: every placement of `student.layers` on one model, text and number of layers.

`python -m benchmarks.quality.placement` runs what is missing and prints what is there; `--table` prints it alone,
`--strategies` runs some of them, `--mixer windowed_mamba2` converts to that. A strategy's result is a file
benchmarks/quality/results/placement-*.json; a run that was stopped goes on where it was, in the middle of scoring too.

SmolLM2-135M, 22 of 30 layers converted (8 keep their attention), windows of 512. Each strategy gets the same
calibration tokens and the same tokens of KL, seed 0; what scoring reads or trains comes on top and is counted in its
CPU minutes (those of the last process, where a run was stopped). Perplexity, KL and retrieval on held-out documents,
after calibration alone and after KL. What is to be retrieved: for `mamba2` which city of whom, some tokens ago; where
the window would know that, a secret word and a list of words at a tenth of a longer text.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

from ssmorph.convert.plan import SCORED, UNSCORED

from .conversions import RUNS, TEACHER, keep, kept

RECIPES = {"mamba2": "135m-mamba2", "windowed_mamba2": "135m-demo"}
CONVERTED = 22
CALIBRATION, WINDOW = 8_192, 512
RATES = {"mamba2": 4e-4, "windowed_mamba2": 3e-4}
HELD_OUT = 8_192
DISTANCES, PROBES = (64, 256), 64
TASKS, LENGTH, DEPTH, FEWER = ("needle", "copying"), 512, 0.1, 32


class Run(NamedTuple):
    """One conversion; `tokens` are of KL."""

    strategy: str
    mixer: str
    tokens: int

    @property
    def name(self) -> str:
        """As its files are called."""
        return f"placement-{self.strategy}-{CONVERTED}-{self.mixer}-{self.tokens // 1000}k"

    def result(self) -> dict[str, Any] | None:
        """What it came to, if it is done."""
        return kept(self.name)


def all_runs(mixer: str, tokens: int = 10_000) -> list[Run]:
    """Every placement, unscored ones first."""
    return [Run(strategy, mixer, tokens) for strategy in UNSCORED + SCORED]


def perform(run: Run) -> None:
    """Converts and measures, then leaves the numbers alone."""
    from ssmorph.verbs import convert

    folder, shared = RUNS / run.name, RUNS / f"scores-{run.mixer}"
    if shared.is_dir() and not folder.is_dir():
        # smart reads the scores of loo
        shutil.copytree(shared, folder / "placement")
    changes = [
        f"student.layers={run.strategy}-{CONVERTED}",
        f"data.window={WINDOW}",
        "evaluate.suite=none",
        "threads=1",
    ]
    changes += [f"stages.calibrate.tokens={CALIBRATION}", f"stages.logits.tokens={run.tokens}"]
    changes += [f"placement.calibration_tokens={CALIBRATION}", f"stages.logits.optim.lr={RATES[run.mixer]}"]
    changes += ["stages.calibrate.refine_steps=0", "stages.logits.optim.rest_lr=0"]
    started = time.process_time()
    convert(
        Path("configs/smollm2") / f"{RECIPES[run.mixer]}.yaml",
        *changes,
        run_dir=str(folder),
        say=lambda text: print(f"  {text}", flush=True),
    )
    minutes = (time.process_time() - started) / 60
    plan = json.loads((folder / "plan.json").read_text())
    result = {
        **run._asdict(), "converted": plan["layers"], "scores": plan.get("scores"), "calibration_tokens": CALIBRATION,
        "rate": RATES[run.mixer], **measured(folder, run.mixer), "cpu_minutes": round(minutes, 1),
    }  # fmt: skip
    if (folder / "placement").is_dir():
        shutil.copytree(folder / "placement", shared, dirs_exist_ok=True)
    keep(run.name, result)


def questions(mixer: str, tokenizer: Any, filler_L: Any) -> dict[str, list[Any]]:
    """What candidates are asked, by a name."""
    from ssmorph.stages.probes import make_task
    from ssmorph.stages.retrieval import make_probes

    if mixer == "mamba2":
        return {str(d): make_probes(tokenizer, filler_L, d, PROBES, 0) for d in DISTANCES}
    return {task: make_task(task, tokenizer, filler_L, LENGTH, DEPTH, FEWER, 0) for task in TASKS}


def measured(folder: Path, mixer: str) -> dict[str, Any]:
    """Rows `calibrated` and `trained` of a finished run, and what the teacher has to show."""
    from ssmorph.convert.teachers import load_teacher
    from ssmorph.stages.artifact import load_student
    from ssmorph.stages.data import PackedData
    from ssmorph.stages.evaluate import heldout_sets
    from ssmorph.stages.retrieval import accuracy, filler_of
    from ssmorph.stages.scores import Candidate, score
    from ssmorph.stages.suite import suite_named

    teacher, tokenizer = load_teacher(TEACHER)
    data = PackedData(folder / "data")
    stages = {"calibrated": "1-calibrate", "trained": "2-logits"}
    students = [Candidate(k, load_student(folder / s / "student", teacher, own_rest=False)) for k, s in stages.items()]
    _, windows_WL = heldout_sets(data, WINDOW, suite_named("short", HELD_OUT, WINDOW))[0]
    rows = {name: s.summary() for name, s in score(teacher, students, windows_WL).items()}
    asked = questions(mixer, tokenizer, filler_of(data))
    found: dict[str, Any] = {}
    for candidate in (Candidate("teacher", teacher), *students):
        row, base = rows[candidate.name], rows["teacher"]["perplexity"]
        ratio = row["perplexity"] / base
        found[candidate.name] = {
            "perplexity": row["perplexity"], "ratio": ratio, "excess": math.log(ratio), "kl": row["kl"],
            "top1": row["top1"], "retrieval": {name: accuracy(candidate, probes) for name, probes in asked.items()},
        }  # fmt: skip
    return {**found, "held_out_tokens": rows["teacher"]["tokens"], "probes": len(next(iter(asked.values())))}


def print_table(runs: list[Run]) -> None:
    """What is there: two rows for each strategy, beside the uniform one's."""
    results = [(run, result) for run in runs if (result := run.result()) is not None]
    uniform = next((r for run, r in results if run.strategy == "uniform"), None)
    asked = list(results[0][1]["teacher"]["retrieval"]) if results else []
    print(f"{'strategy':10} {'':10} x teacher  excess     KL  KL - uniform  retrieval: {', '.join(asked)}")
    for run, result in results:
        for stage in ("calibrated", "trained"):
            row = result[stage]
            gap = f"{row['kl'] - uniform[stage]['kl']:+.3f}" if uniform else ""
            found = " ".join(f"{share:.2f}" for share in row["retrieval"].values())
            numbers = f"{row['ratio']:9.3f} {row['excess']:7.3f} {row['kl']:6.3f} {gap:>13}"
            print(f"{run.strategy:10} {stage:10} {numbers}  {found}")
    for run, result in results:
        kept = [i for i in range(30) if i not in result["converted"]]
        print(f"{run.strategy:10} keeps {kept}, {result['cpu_minutes']} CPU minutes")
    if results:
        found = " ".join(f"{share:.2f}" for share in results[0][1]["teacher"]["retrieval"].values())
        print(f"the teacher retrieves {found}, chance is 0.25")


def main() -> None:
    """The runs that are missing, then the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--mixer", default="mamba2", choices=RECIPES)
    parser.add_argument("--tokens", type=int, default=10_000, help="of KL")
    parser.add_argument("--strategies", nargs="+", choices=UNSCORED + SCORED, default=list(UNSCORED + SCORED))
    arguments = parser.parse_args()
    runs = [Run(strategy, arguments.mixer, arguments.tokens) for strategy in arguments.strategies]
    for run in [] if arguments.table else runs:
        if run.result() is None:
            print(run.name, flush=True)
            perform(run)
    print_table(runs)


if __name__ == "__main__":
    main()
