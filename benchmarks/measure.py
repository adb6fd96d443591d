"""Times, memory and this machine's matrix products, as benchmarks.kernels prints them."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

Call = Callable[[], object]
SECONDS, LEAST = 2.0, 5


@dataclass(frozen=True)
class Case:
    """One problem: calls that solve it, our default backend first, and the peers that cannot run here with the reason.

    `flops` are those of the scan's products, where their share of the machine's is printed.
    """

    name: str
    calls: dict[str, Call]
    absent: dict[str, str]
    flops: float | None = None


def seconds(call: Call, device: str) -> float:
    """Of one call: on a CPU the process's time, on a GPU wall time between synchronisations."""
    if device == "cuda":
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    before = time.process_time()
    call()
    return time.process_time() - before


def rounds(calls: Mapping[str, Call], device: str, least: int = LEAST, each: float = SECONDS) -> dict[str, list[float]]:
    """Every call's times in turns, so that a busy moment hits everyone; every other round goes backwards."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    until, order = time.monotonic() + each * len(calls), list(calls)
    for call in calls.values():
        call()
    while len(times[order[0]]) < least or time.monotonic() < until:
        for name in order:
            times[name].append(seconds(calls[name], device))
        order.reverse()
    return times


def fastest_chunks(calls: Mapping[str, Call], device: str) -> dict[str, Call]:
    """All calls, but of those that differ in the length of their chunks only the fastest of a few times."""
    kept: dict[str, tuple[float, str]] = {}
    for name, call in calls.items():
        family = name.split(", chunks of")[0]
        took = min(seconds(call, device) for _ in range(3)) if family != name else 0.0
        kept[family] = min(kept.get(family, (took, name)), (took, name))
    return {name: calls[name] for _, name in kept.values()}


def paired(times: list[float], ours: list[float]) -> float:
    """The median over rounds of one call's time over ours in the same round."""
    return statistics.median(t / own for t, own in zip(times, ours, strict=True))


def matmul_peak(device: str, dtype: torch.dtype) -> tuple[str, float]:
    """What was multiplied, and FLOP/s of the best of several products of square matrices."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = min(seconds(lambda: a @ b, device) for _ in range(6))
    return f"{size}^3 {str(dtype).split('.')[1]}", 2 * size**3 / best


def added_memory(case: str, call: str, device: str, ops: str) -> float:
    """MiB that a call adds at its peak, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.kernels", "--device", device, "--op", ops, "--memory", case, call]
    return float(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]))


def print_memory(call: Call, device: str) -> None:
    """What one call adds here. A first call at tiny size would leave other allocations behind."""
    if device == "cuda":
        call()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        print((torch.cuda.max_memory_allocated() - before) / 2**20)
    else:
        # 5 resets the peak, which a child otherwise inherits from its parent (proc(5))
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        call()
        print((_resident("VmHWM") - before) / 2**10)


def _resident(field: str) -> int:
    """KiB of this process in memory (VmRSS), or at most (VmHWM), on Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])
