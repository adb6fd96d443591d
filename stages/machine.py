"""How torch should compute here: how many threads, and which library multiplies float32 matrices.

Both are measured. Two threads can be much slower than one on virtual cores. And on some processors torch's default
library leaves half the speed unused, while oneDNN, which torch asks only where less than float32 is allowed, does the
same products in full float32; where it would round, since it has units for bfloat16, the default stays.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Literal

import torch

from ..errors import fail

# seconds of measurement for each candidate
BUDGET = 0.6
# relative error of a float32 product of 576 terms: both libraries give 2e-7 to 6e-7, bfloat16 gives 2e-3
FLOAT32_ERROR = 2e-6
# how much faster oneDNN must be before it is worth leaving the default
GAIN = 1.1

Products = Literal["default", "onednn"]


def choose_threads() -> int:
    """The fastest of 1, 2, 4 ... up to the CPU count on a miniature of the real work."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    candidates = [1 << i for i in range(count.bit_length()) if 1 << i <= count]
    return min(candidates, key=seconds) if len(candidates) > 1 else 1


@contextlib.contextmanager
def as_before() -> Iterator[None]:
    """Puts back what a run changes in the whole process when it ends: threads, the library of products, the seed."""
    threads, products, seed = torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(products)
        torch.set_rng_state(seed)


def check_device(device: str) -> None:
    """Raises ValueError where torch has no such device, before anything is loaded."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).strip().splitlines()[0]
        do = "Use device=cpu, or a build of torch for your card."
        raise fail("device", "must be one that torch has here", f"{device} ({first})", do) from error


def choose_products() -> Products:
    """`onednn` where it multiplies float32 as exactly as the default and faster; tried with torch's current threads."""
    before, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    try:
        set_products("default")
        default = seconds(threads)
        return "onednn" if set_products("onednn") == "onednn" and seconds(threads) * GAIN < default else "default"
    finally:
        torch.set_float32_matmul_precision(before)


def set_products(wanted: Products) -> Products:
    """Has torch multiply float32 matrices by this library in the whole process; returns what it uses.

    That is the default after all where oneDNN would round: a run can have been moved to another processor.
    """
    # what torch calls medium: on a CPU it hands products to oneDNN, with leave to round to bfloat16
    torch.set_float32_matmul_precision("medium" if wanted == "onednn" else "highest")
    if wanted == "onednn" and product_error() > FLOAT32_ERROR:
        return set_products("default")
    return wanted


def product_error() -> float:
    """Relative error of a float32 product, as torch is set now."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(512, 576, generator=generator), torch.randn(1536, 576, generator=generator)
    exact = x.double() @ w.double().T
    # both layouts of the weight, since a layer's gradients take the other one
    errors = [torch.nn.functional.linear(x, w).double() - exact, (x @ w.T.contiguous()).double() - exact]
    return max(float(e.norm() / exact.norm()) for e in errors)


def seconds(threads: int) -> float:
    """Of a miniature of the real work with so many threads: the best of those that fit into a short budget."""
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
