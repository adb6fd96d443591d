"""Peak memory of one step of the mixing stage against the window length: `python -m benchmarks.mixing_memory`.

A random teacher of SmolLM2-135M's sizes, 3 layers, one converted: teacher forward, loss, gradients. Each length
runs in a fresh process. The peer is the same step with both L x L matrices written out: this package's own reference.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import torch

LENGTHS = (1024, 2048, 4096, 8192)
# beyond, the peer needs more memory than laptops have
PEER_UP_TO = 4096


def child(length: int) -> None:
    """Prints the MiB that a step adds to the process; the backend comes from SSMORPH_BACKEND."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from ssmorph.convert.capture import captured
    from ssmorph.convert.families import FAMILIES
    from ssmorph.convert.surgery import copy_attention
    from ssmorph.stages.mixing import align_matrices

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=576, intermediate_size=1536, num_hidden_layers=3, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192,
    )  # fmt: skip
    teacher, family = LlamaForCausalLM(config).eval().requires_grad_(False), FAMILIES["llama"]
    mixer = copy_attention(teacher, family, 1, "mamba2")
    mixer.requires_grad_(True)

    def step(tokens: int) -> None:
        with captured(teacher, family, [1], attention=True) as calls:
            teacher.model(torch.randint(0, 1000, (1, tokens)), use_cache=False)
        align_matrices({1: mixer}, calls, "cosine")

    step(64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(length)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def main() -> None:
    """Prints MiB for each length, MiB per 1024 tokens, and the ratio to the reference."""
    for length in LENGTHS:
        used = {}
        for backend in ("", "reference") if length <= PEER_UP_TO else ("",):
            command = [sys.executable, "-m", "benchmarks.mixing_memory", str(length)]
            # empty: the best one for each operation
            environment = {**os.environ, "SSMORPH_BACKEND": backend}
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            used[backend] = float(done.stdout)
        own = used[""]
        ratio = f"{used['reference'] / own:.1f} x that" if "reference" in used else "not run"
        per = own / length * 1024
        print(f"L {length}: {own:.0f} MiB, {per:.0f} per 1024 tokens; with both matrices written out {ratio}")


if __name__ == "__main__":
    child(int(sys.argv[1])) if len(sys.argv) > 1 else main()
