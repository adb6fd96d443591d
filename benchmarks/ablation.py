"""What each stage of a run was worth, against its teacher: `python -m benchmarks.ablation RUN_DIR [TOKENS]`.

Scores the artifact of every finished stage on the same held-out documents; the first one is the untrained copy.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import yaml

from ssmorph.convert.teachers import load_teacher
from ssmorph.stages.artifact import load_student
from ssmorph.stages.data import PackedData
from ssmorph.stages.evaluate import heldout_sets
from ssmorph.stages.machine import set_products
from ssmorph.stages.recipe import build
from ssmorph.stages.scores import Candidate, score
from ssmorph.stages.suite import suite_named


def main(run: Path, tokens: int) -> None:
    """Prints perplexity, its ratio to the teacher's, KL and top-1 agreement after every stage."""
    config = build(yaml.safe_load((run / "config.yaml").read_text()))
    environment = yaml.safe_load((run / "env.json").read_text())
    torch.set_num_threads(environment["threads"])
    set_products(environment.get("products", "default"))
    teacher, _ = load_teacher(config.teacher.source)
    data = PackedData(run / "data")
    name, windows_WL = heldout_sets(data, config.data.window, suite_named("short", tokens, config.data.window))[0]
    done = [stage for stage in config.stage_names() if (run / stage / "DONE").exists()]
    students = [Candidate(stage, load_student(run / stage / "student", teacher, own_rest=False)) for stage in done]
    scores = score(teacher, students, windows_WL)
    base = scores["teacher"].summary()["perplexity"]
    print(f"{name}, {windows_WL.numel()} tokens in windows of {config.data.window}, seed {config.seed}")
    for stage, result in scores.items():
        row = result.summary()
        numbers = f"perplexity {row['perplexity']:10.2f}  x teacher {row['perplexity'] / base:8.3f}  KL {row['kl']:.3f}"
        print(f"{stage:14} {numbers}  top-1 {row['top1']:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 8192)
