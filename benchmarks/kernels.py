"""Our kernels beside named peers, in one process: `python -m benchmarks.kernels [--device cuda] [--op ssd,mixing]`.

Prints the best time of each (CPU: one thread, CPU time; GPU: wall time between synchronisations), the ratio of each
peer to ours, and the memory that a call adds (CPU: peak resident memory of a fresh process, on Linux; GPU: the
allocator's peak). Peers that cannot run here are named. On a CPU float32 and SmolLM2-135M's shapes; on a GPU bfloat16,
8 x 2048 tokens, 32 heads of 64.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmorph.kernels.distill import distill_loss
from ssmorph.kernels.mixing import mixing_loss
from ssmorph.kernels.ssd import ssd, ssd_step

OPS = ("ssd", "step", "mixing", "distill")
CHUNKS = (32, 64, 128, 256)
SECONDS, LEAST = 2.0, 3


@dataclass(frozen=True)
class Case:
    """One problem: calls that solve it, ours first, and the peers that cannot run here with the reason."""

    name: str
    calls: dict[str, Callable[[], object]]
    absent: dict[str, str]


def cases(device: str, ops: tuple[str, ...]) -> Iterator[Case]:
    """All problems, made one after the other."""
    gpu = device == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    batch, heads = (8, 32) if gpu else (1, 9)
    if "ssd" in ops:
        for length in (2048,) if gpu else (2048, 4096):
            for grads in (False, True):
                yield ssd_case(device, dtype, batch, length, heads, grads)
    if "step" in ops:
        yield step_case(device, dtype, 128 if gpu else 1, heads)
    if "mixing" in ops:
        for length in (512, 1024, 2048):
            yield mixing_case(device, dtype, 1, length, heads)
    if "distill" in ops:
        yield distill_case(device, dtype, 8192 if gpu else 1024, 2048 if gpu else 576)


def peer(module: str, name: str) -> Callable[..., Any] | str:
    """A peer's function, or why it cannot be had."""
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except Exception as error:  # a package built for another torch fails in any way it likes
        return f"{type(error).__name__}: {error}".splitlines()[0][:100]
    return found


def random(*shape: int, device: str, dtype: torch.dtype, grads: bool = False) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, device=device, dtype=dtype).requires_grad_(grads)


def ssd_case(device: str, dtype: torch.dtype, batch: int, length: int, heads: int, grads: bool) -> Case:
    """The scan, P = N = 64 and a group for each head, in the stock form (w = dt, log a = -dt A)."""
    torch.manual_seed(0)
    x, B, C = (random(batch, length, heads, 64, device=device, dtype=dtype, grads=grads) for _ in range(3))
    dt = (0.1 * torch.rand(batch, length, heads, device=device)).requires_grad_(grads)
    A = -torch.linspace(1, 8, heads, device=device)
    dy = torch.randn_like(x)

    def run(scan: Callable[[], Tensor]) -> Callable[[], object]:
        def call() -> object:
            if not grads:
                with torch.no_grad():
                    return scan()
            return torch.autograd.grad(scan(), (x, B, C, dt), dy)

        return call

    calls = {"ours": run(lambda: ssd(x, dt * A, B, C, w_BLH=dt)[0])}
    absent = {}
    theirs: dict[str, tuple[str, str, Callable[..., Any]]] = {
        f"transformers, chunks of {chunk}": (
            "transformers.models.mamba2.modeling_mamba2",
            "mamba2_chunk_scan",
            lambda scan, chunk=chunk: first(scan(x, dt, A, B, C, chunk)).to(dtype),
        )
        for chunk in CHUNKS
    }
    if device == "cuda":
        theirs["mamba-ssm"] = (
            "mamba_ssm.ops.triton.ssd_combined",
            "mamba_chunk_scan_combined",
            lambda scan: scan(x, dt, A, B, C, 256),
        )
        theirs["fla"] = (
            "fla.ops.simple_gla",
            "chunk_simple_gla",
            lambda scan: scan(C, B, x * dt[..., None].to(dtype), dt * A, scale=1.0)[0],
        )
    else:
        absent = dict.fromkeys(("mamba-ssm", "fla"), "needs a GPU")
    for name, (module, function, use) in theirs.items():
        scan = peer(module, function)
        if isinstance(scan, str):
            absent[name] = scan
        else:
            calls[name] = run(functools.partial(use, scan))
    return Case(f"ssd L={length} {'forward + backward' if grads else 'forward'}", calls, absent)


def first(result: Any) -> Tensor:
    """The output alone."""
    found: Tensor = result[0] if isinstance(result, tuple) else result
    return found


def step_case(device: str, dtype: torch.dtype, batch: int, heads: int) -> Case:
    """One decoded token."""
    x, B, C = (random(batch, heads, 64, device=device, dtype=dtype) for _ in range(3))
    dt = 0.1 * torch.rand(batch, heads, device=device)
    A = -torch.linspace(1, 8, heads, device=device)
    state, other_state = (torch.zeros(batch, heads, 64, 64, device=device) for _ in range(2))
    calls: dict[str, Callable[[], object]] = {"ours": lambda: ssd_step(state, x, dt * A, B, C, w_BH=dt)}
    other = peer("transformers.models.mamba2.modeling_mamba2", "mamba2_selective_state_update")
    if isinstance(other, str):
        return Case("step", calls, {"transformers": other})
    wide_dt, wide_A = dt[..., None].expand(-1, -1, 64), A[:, None, None].expand(-1, 64, 64)
    calls["transformers"] = torch.no_grad()(lambda: other(other_state, x, wide_dt, wide_A, B, C))
    return Case("step", calls, {})


def mixing_case(device: str, dtype: torch.dtype, batch: int, length: int, heads: int) -> Case:
    """Frobenius loss and gradients, K = N = 64; the peer writes both matrices out, for autograd."""
    torch.manual_seed(0)
    C, B = (random(batch, length, heads, 64, device=device, dtype=dtype, grads=True) for _ in range(2))
    q, k = (random(batch, length, heads, 64, device=device, dtype=dtype) for _ in range(2))
    log_a = (-0.1 * torch.rand(batch, length, heads, device=device)).requires_grad_()

    def run(backend: str | None) -> Callable[[], object]:
        def call() -> object:
            loss = mixing_loss(C, B, log_a, q, k, scale=0.125, loss="frobenius", backend=backend)
            return torch.autograd.grad(loss, (C, B, log_a))

        return call

    calls = {"ours": run(None), "both matrices written out": run("reference")}
    return Case(f"mixing L={length} loss + gradients", calls, {})


def distill_case(device: str, dtype: torch.dtype, tokens: int, width: int) -> Case:
    """Forward KL through a frozen head of 49152 tokens; the peer holds all logits."""
    torch.manual_seed(0)
    student = random(tokens, width, device=device, dtype=dtype, grads=True)
    teacher = random(tokens, width, device=device, dtype=dtype)
    head = random(49152, width, device=device, dtype=dtype) * width**-0.5

    def run(backend: str | None) -> Callable[[], object]:
        def call() -> object:
            return torch.autograd.grad(distill_loss(student, head, teacher, head, backend=backend), student)

        return call

    return Case(f"distill T={tokens} V=49152 D={width}", {"ours": run(None), "logits in full": run("reference")}, {})


def seconds(call: Callable[[], object], device: str) -> float:
    """Of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    before = time.process_time()
    call()
    return time.process_time() - before


def best_times(case: Case, device: str) -> dict[str, float]:
    """The smallest of many times, taken in turns so that a busy moment hits everyone."""
    best: dict[str, float] = {}
    until, rounds = time.monotonic() + SECONDS * len(case.calls), 0
    while rounds < LEAST or time.monotonic() < until:
        for name, call in case.calls.items():
            best[name] = min(best.get(name, float("inf")), seconds(call, device))
        rounds += 1
    return best


def added_memory(case: str, call: str, device: str, ops: str) -> float:
    """MiB that a call adds at its peak."""
    command = [sys.executable, "-m", "benchmarks.kernels", "--device", device, "--op", ops, "--memory", case, call]
    return float(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]))


def measure_memory(device: str, ops: tuple[str, ...], case_name: str, call_name: str) -> None:
    """In a fresh process: prints what one call adds. A first call at tiny size would leave other allocations behind."""
    call = next(case for case in cases(device, ops) if case.name == case_name).calls[call_name]
    if device == "cuda":
        call()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        print((torch.cuda.max_memory_allocated() - before) / 2**20)
    else:
        # 5 resets the peak, which a child otherwise inherits from its parent (proc(5))
        Path("/proc/self/clear_refs").write_text("5")
        before = resident()
        call()
        print((resident("VmHWM") - before) / 2**10)


def resident(field: str = "VmRSS") -> int:
    """KiB of this process in memory, or at most (VmHWM), on Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def main() -> None:
    """Prints a table for each problem."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--op", default=",".join(OPS), help="comma-separated, of " + ", ".join(OPS))
    parser.add_argument("--memory", nargs=2, metavar=("CASE", "CALL"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    ops = tuple(given.op.split(","))
    unknown = [op for op in ops if op not in OPS]
    if unknown:
        parser.error(f"--op: must be of {', '.join(OPS)}; got {unknown[0]}")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU is visible to torch")
    torch.set_num_threads(1)
    if given.memory:
        measure_memory(given.device, ops, *given.memory)
        return
    where = (
        torch.cuda.get_device_name() if given.device == "cuda" else f"{platform.processor() or platform.machine()} CPU"
    )
    print(f"{where}, torch {torch.__version__}, Python {platform.python_version()}")
    for case in cases(given.device, ops):
        times = best_times(case, given.device)
        ours = times["ours"]
        print(f"\n{case.name}")
        fastest = min((t, name) for name, t in times.items() if name != "ours") if len(times) > 1 else None
        for name, took in times.items():
            if name.startswith("transformers, chunks") and (took, name) != fastest:
                continue  # only its best chunk length
            memory = (
                "" if case.name == "step" else f"  {added_memory(case.name, name, given.device, given.op):7.0f} MiB"
            )
            print(f"  {name:30} {took * 1e3:10.3f} ms  {took / ours:6.2f} x ours{memory}")
        for name, why in case.absent.items():
            print(f"  {name:30} not run: {why}")


if __name__ == "__main__":
    main()
