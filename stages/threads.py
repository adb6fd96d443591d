"""How many threads torch should use here: measured, since two can be much slower than one on virtual cores."""

from __future__ import annotations

import os
import time

import torch

# seconds of measurement for each candidate
BUDGET = 0.6


def choose_threads() -> int:
    """The fastest of 1, 2, 4 ... up to the CPU count on a miniature of the real work."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    candidates = [1 << i for i in range(count.bit_length()) if 1 << i <= count]
    return min(candidates, key=_seconds) if len(candidates) > 1 else 1


def _seconds(threads: int) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, w = torch.randn(1024, 576), torch.randn(576, 1536)
        best, end = float("inf"), time.perf_counter() + BUDGET
        while time.perf_counter() < end:
            start = time.perf_counter()
            y = torch.nn.functional.silu(x @ w)
            (y @ w.T).softmax(-1)
            best = min(best, time.perf_counter() - start)
        return best
    finally:
        torch.set_num_threads(before)
