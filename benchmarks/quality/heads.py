"""What a few kept heads are worth: none, the foremost 20 and 40 by the probe, and 20 evenly spread.

`python -m benchmarks.quality.heads` runs what is missing and prints what is there; `--table` prints it alone, `--heads`
runs some. A result is a file benchmarks/quality/results/heads-*.json. SmolLM2-135M, 15 of 30 layers converted, 8,192
calibration tokens in windows of 512, no training, seed 0. Perplexity and KL on held-out documents; how often the value
of a key is named on key-value probes of another seed than the one that chose heads; bytes of cache at 4,096 tokens.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shutil
import time
from pathlib import Path
from typing import Any

RECIPE = Path("configs/smollm2/135m-mamba2.yaml")
RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs/heads")
CALIBRATION, HELD_OUT, CONTEXT = 8_192, 4_096, 4_096
PROBES, PROBE_SEED = 32, 1
CHOICES = ("none", "retrieval-20", "spread-20", "retrieval-40")


def student_of(choice: str) -> list[str]:
    """The overrides of a choice."""
    from ssmorph.convert.families import attention_shape
    from ssmorph.convert.plan import resolve_layers, spread_heads
    from ssmorph.convert.teachers import load_config

    if choice == "none":
        return []
    heads = choice
    if choice.startswith("spread-"):
        shape = attention_shape(load_config("smollm2-135m"))
        pairs = spread_heads(int(choice.removeprefix("spread-")), resolve_layers("uniform-15", shape.layers), shape)
        heads = str([f"{layer}.{head}" for layer, head in pairs])
    return ["student.mixer=mamba2_heads", f"student.heads={heads}"]


def perform(choice: str) -> None:
    """Converts up to calibration and measures, then leaves the numbers alone."""
    from ssmorph.stages.rundir import atomic_write
    from ssmorph.verbs import convert

    folder, changes = RUNS / choice, [f"stages.calibrate.tokens={CALIBRATION}", "threads=1", *student_of(choice)]
    started = time.process_time()
    convert(RECIPE, *changes, run_dir=str(folder), until="calibrate", say=lambda text: print(f"  {text}", flush=True))
    minutes = (time.process_time() - started) / 60
    plan = json.loads((folder / "plan.json").read_text())
    result = {
        "heads": " ".join(f"{layer}.{head}" for layer, head in plan.get("heads", [])), **measured(folder),
        "cpu_minutes": round(minutes, 1), "date": datetime.date.today().isoformat(),
        "machine": platform.processor() or platform.machine(),
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    atomic_write(RESULTS / f"heads-{choice}.json", json.dumps(result, indent=1) + "\n")
    shutil.rmtree(folder)


def measured(folder: Path) -> dict[str, Any]:
    """The teacher's and the student's numbers."""
    import torch

    from ssmorph.convert.teachers import load_teacher
    from ssmorph.stages.artifact import load_student
    from ssmorph.stages.data import PackedData
    from ssmorph.stages.decode import filled_cache, measure_bytes
    from ssmorph.stages.evaluate import heldout_sets
    from ssmorph.stages.head_probe import key_value_probes
    from ssmorph.stages.scores import Candidate, score
    from ssmorph.stages.suite import suite_named

    teacher, tokenizer = load_teacher("smollm2-135m")
    student = load_student(folder / "1-calibrate" / "student", teacher, own_rest=False)
    _, windows_WL = heldout_sets(PackedData(folder / "data"), 512, suite_named("short", HELD_OUT, 512))[0]
    scores = score(teacher, [Candidate("student", student)], windows_WL)
    rows = {name: s.summary() for name, s in scores.items()}
    tokens_BL, asked_T = key_value_probes(tokenizer, PROBE_SEED, PROBES)
    found: dict[str, Any] = {"held_out_tokens": rows["teacher"]["tokens"]}
    for name, model in (("teacher", teacher), ("student", student)):
        with torch.no_grad():
            named_BT = model(tokens_BL).logits[:, asked_T - 1].argmax(-1)
        found[name] = {
            "ratio": rows[name]["perplexity"] / rows["teacher"]["perplexity"], "kl": rows[name]["kl"],
            "named": float((named_BT == tokens_BL[:, asked_T]).float().mean()),
            "cache_bytes": measure_bytes(filled_cache(model, CONTEXT)),
        }  # fmt: skip
    return found


def print_table() -> None:
    """What is there."""
    print(f"{'heads':14} x teacher     KL  values named  cache at {CONTEXT} tokens")
    shown: dict[str, Any] = {}
    for choice in CHOICES:
        file = RESULTS / f"heads-{choice}.json"
        if file.is_file():
            result = json.loads(file.read_text())
            shown |= {"teacher": result["teacher"], choice: result["student"]}
    for name, row in shown.items():
        size = f"{row['cache_bytes'] / 2**20:.1f} MiB"
        print(f"{name:14} {row['ratio']:9.3f} {row['kl']:6.3f} {row['named']:13.3f}  {size}")


def main() -> None:
    """The runs that are missing, then the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--heads", nargs="*", default=CHOICES, choices=CHOICES)
    arguments = parser.parse_args()
    for choice in [] if arguments.table else arguments.heads:
        if not (RESULTS / f"heads-{choice}.json").is_file():
            print(choice, flush=True)
            perform(choice)
    print_table()


if __name__ == "__main__":
    main()
