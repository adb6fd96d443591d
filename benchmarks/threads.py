"""Whether the thread policy picks the better count: `python -m benchmarks.threads`.

Runs the real work (a decoder layer's forward and backward at SmolLM2-135M's sizes) in a fresh process per thread count,
interleaved, and compares what `choose_threads` picked with the better of one and two.
"""

from __future__ import annotations

import os
import subprocess
import sys

import torch

REPEATS = 3


def work() -> float:
    """Seconds of the fastest of six forward and backward passes over 1024 tokens."""
    import time

    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=576, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=9,
        num_key_value_heads=3,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    tokens = torch.randint(0, 1000, (2, 512))
    times = []
    for _ in range(6):
        start = time.perf_counter()
        model(tokens, labels=tokens).loss.backward()
        times.append(time.perf_counter() - start)
    return min(times)


def child(threads: str) -> None:
    """Measures with a given count, or with what the policy chooses ('policy')."""
    from ssmorph.stages.machine import choose_threads

    count = choose_threads() if threads == "policy" else int(threads)
    torch.set_num_threads(count)
    print(count, work())


def main() -> None:
    """Prints the best time of each and the policy's ratio to the better of one and two."""
    best: dict[str, tuple[float, str]] = {}
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    for _ in range(REPEATS):
        for threads in ("1", "2", "policy"):
            command = [sys.executable, "-m", "benchmarks.threads", threads]
            out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.split()
            best[threads] = min(best.get(threads, (float("inf"), "")), (float(out[1]), out[0]))
    for threads, (took, count) in best.items():
        print(f"{threads}: {took:.3f} s with {count} threads")
    print(f"policy / better of one and two: {best['policy'][0] / min(best['1'][0], best['2'][0]):.3f}")


if __name__ == "__main__":
    child(sys.argv[1]) if len(sys.argv) > 1 else main()
