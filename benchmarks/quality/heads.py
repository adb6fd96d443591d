"""What a few kept heads are worth: none, the foremost 20 and 40 by the probe, and 20 evenly spread.

`python -m benchmarks.quality.heads` runs what is missing and prints what is there; `--table` prints it alone, `--heads`
runs some. A result is a file benchmarks/quality/results/heads-*.json. SmolLM2-135M, 15 of 30 layers converted, 8,192
calibration tokens in windows of 512, no training, seed 0. Perplexity and KL on held-out documents; how often the value
of a key is named on key-value probes of another seed than the one that chose heads; bytes of cache at 4,096 tokens.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .conversions import Converted, converted, keep, kept, scored

RECIPE = Path("configs/smollm2/135m-mamba2.yaml")
HELD_OUT, CONTEXT = 4_096, 4_096
STAGES = "stages=[{kind: surgery}, {kind: calibrate, tokens: 8192, refine_steps: 0}]"
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
    """Converts and calibrates and measures, then leaves the numbers alone."""
    done = converted(f"heads-{choice}", RECIPE, [STAGES, *student_of(choice)])
    chosen = [f"{i}.{head}" for i, mixer in done.student.mixers().items() for head in mixer.shape.kept]
    keep(f"heads-{choice}", {"heads": " ".join(chosen), **measured(done)})


def measured(done: Converted) -> dict[str, Any]:
    """The teacher's and the student's numbers."""
    import torch

    from ssmorph.stages.decode import filled_cache, measure_bytes
    from ssmorph.stages.head_probe import key_value_probes

    row = scored(done, tokens=HELD_OUT)
    tokens_BL, asked_T = key_value_probes(done.tokenizer, PROBE_SEED, PROBES)
    found: dict[str, Any] = {"held_out_tokens": row["held_out_tokens"], "cpu_minutes": row["cpu_minutes"]}
    for name, model in (("teacher", done.teacher), ("student", done.student)):
        with torch.no_grad():
            named_BT = model(tokens_BL).logits[:, asked_T - 1].argmax(-1)
        found[name] = {
            "ratio": row["ratio"] if name == "student" else 1.0, "kl": row["kl"] if name == "student" else 0.0,
            "named": float((named_BT == tokens_BL[:, asked_T]).float().mean()),
            "cache_bytes": measure_bytes(filled_cache(model, CONTEXT)),
        }  # fmt: skip
    return found


def print_table() -> None:
    """What is there."""
    print(f"{'heads':14} x teacher     KL  values named  cache at {CONTEXT} tokens")
    shown: dict[str, Any] = {}
    for choice in CHOICES:
        result = kept(f"heads-{choice}")
        if result is not None:
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
        if kept(f"heads-{choice}") is None:
            print(choice, flush=True)
            perform(choice)
    print_table()


if __name__ == "__main__":
    main()
