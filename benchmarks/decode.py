"""Decoding of a finished run beside its teacher, by turns, one text at a time: `python -m benchmarks.decode RUN`.

Caches are synthetic. Printed are tokens per second, the best of some rounds, and the hybrid's over the teacher's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import ssmorph.hf  # noqa: F401  registers the classes
from ssmorph.convert.teachers import load_teacher
from ssmorph.stages.decode import decode_speed
from ssmorph.stages.recipe import load_saved

CONTEXTS, ROUNDS = (512, 4096), 3


def main() -> None:
    """Prints a line for each context."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    wanted = load_saved(given.run).teacher
    teacher, _ = load_teacher(wanted.source, wanted.revision, wanted.trust_remote_code)
    models = {"teacher": teacher, "hybrid": AutoModelForCausalLM.from_pretrained(given.run / "final")}
    for context in CONTEXTS:
        speeds = dict.fromkeys(models, 0.0)
        for _ in range(ROUNDS):
            for name, model in models.items():
                speeds[name] = max(speeds[name], decode_speed(model, context)["tokens_per_second"])
        numbers = ", ".join(f"{name} {speed:.1f}" for name, speed in speeds.items())
        print(f"{context} tokens: {numbers} tokens/s, {speeds['hybrid'] / speeds['teacher']:.2f} x")


if __name__ == "__main__":
    main()
