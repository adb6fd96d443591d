"""Our kernels beside named peers, in one process: `python -m benchmarks.kernels [--device cuda] [--op ssd,mixing]`.

All take turns. Printed are the least time of each (CPU: one thread, CPU time; GPU: wall time between synchronisations),
the median over rounds of its time over that of our default backend in the same round, and the memory that a call adds
(CPU: peak resident memory of a fresh process, on Linux; GPU: the allocator's peak). Peers that cannot run here are
named. On a CPU float32 and SmolLM2-135M's shapes; on a GPU bfloat16, 8 x 2048 tokens, 32 heads of 64.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator

import torch

from ssmorph.kernels import distill, mixing

from .measure import Call, Case, added_memory, fastest_chunks, matmul_peak, paired, print_memory, rounds
from .scan_cases import COUNT, ours, random, ssd_case, step_case
from .window_case import window_case

OPS = ("ssd", "step", "window", "mixing", "distill")


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
    if "window" in ops:
        yield window_case(device, dtype, 128 if gpu else 1, heads, heads // (4 if gpu else 3))
    if "mixing" in ops:
        for length in (512, 1024, 2048):
            yield mixing_case(device, dtype, 1, length, heads)
    if "distill" in ops:
        yield distill_case(device, dtype, 8192 if gpu else 1024, 2048 if gpu else 576)


def mixing_case(device: str, dtype: torch.dtype, batch: int, length: int, heads: int) -> Case:
    """Frobenius loss and gradients, K = N = 64; the peer writes both matrices out, for autograd."""
    torch.manual_seed(0)
    C, B = (random(batch, length, heads, 64, device=device, dtype=dtype, grads=True) for _ in range(2))
    q, k = (random(batch, length, heads, 64, device=device, dtype=dtype) for _ in range(2))
    log_a = (-0.1 * torch.rand(batch, length, heads, device=device)).requires_grad_()

    def run(backend: str) -> Call:
        def call() -> object:
            loss = mixing.mixing_loss(C, B, log_a, q, k, scale=0.125, loss="frobenius", backend=backend)
            return torch.autograd.grad(loss, (C, B, log_a))

        return call

    calls = {**ours(mixing.BACKENDS, device, run), "both matrices written out": run("reference")}
    return Case(f"mixing L={length} loss + gradients", calls, {})


def distill_case(device: str, dtype: torch.dtype, tokens: int, width: int) -> Case:
    """Forward KL through a frozen head of 49152 tokens; the peer holds all logits."""
    torch.manual_seed(0)
    student = random(tokens, width, device=device, dtype=dtype, grads=True)
    teacher = random(tokens, width, device=device, dtype=dtype)
    head = random(49152, width, device=device, dtype=dtype) * width**-0.5

    def run(backend: str) -> Call:
        def call() -> object:
            return torch.autograd.grad(distill.distill_loss(student, head, teacher, head, backend=backend), student)

        return call

    calls = {**ours(distill.BACKENDS, device, run), "logits in full": run("reference")}
    return Case(f"distill T={tokens} V=49152 D={width}", calls, {})


def report(case: Case, device: str, dtype: torch.dtype, ops: str) -> None:
    """Prints the table of one problem."""
    calls = fastest_chunks(case.calls, device)
    times = rounds(calls, device)
    first = next(iter(calls))
    print(f"\n{case.name}, {len(times[first])} rounds")
    for name, taken in times.items():
        memory = "" if case.name.endswith("step") else f"  {added_memory(case.name, name, device, ops):7.0f} MiB"
        print(f"  {name:34} {min(taken) * 1e3:10.3f} ms  {paired(taken, times[first]):6.2f} x{memory}")
    for name, why in case.absent.items():
        print(f"  {name:34} not run: {why}")
    if case.flops is not None:
        what, peak = matmul_peak(device, dtype)
        shares = ", ".join(
            f"{name[6:-1]} {case.flops / min(taken) / peak:.0%}" for name, taken in times.items() if "ours" in name
        )
        print(f"  share of the {peak / 1e9:.1f} GFLOP/s of {what} products: {shares}")


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
    gpu = given.device == "cuda"
    if gpu and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU is visible to torch")
    torch.set_num_threads(1)
    if given.memory:
        case_name, call_name = given.memory
        found = next(case for case in cases(given.device, ops) if case.name == case_name)
        print_memory(found.calls[call_name], given.device)
        return
    where = torch.cuda.get_device_name() if gpu else f"{platform.processor() or platform.machine()} CPU, one thread"
    print(f"{where}, torch {torch.__version__}, Python {platform.python_version()}")
    print("least time of a call, the median over rounds of its time over our first one's, memory that it adds")
    print(COUNT)
    for case in cases(given.device, ops):
        report(case, given.device, torch.bfloat16 if gpu else torch.float32, given.op)


if __name__ == "__main__":
    main()
