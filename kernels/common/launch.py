"""Starts Triton kernels, or writes down how they would be started, so that what is compiled ahead is what runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import gpu
from .shipped import Shipped

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
_recorded: list[Shipped] | None = None


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    name: str,
    warps: int,
    stages: int,
    exempt: str = "",
    **constants: Any,
) -> None:
    """Runs `kernel` over `grid`; inside `recorded` only notes it."""
    if _recorded is not None:
        _recorded.append(_describe(kernel, arguments, constants, name, warps, stages, exempt))
    else:
        kernel[grid](*arguments, **constants, num_warps=warps, num_stages=stages)


@contextlib.contextmanager
def recorded(arch: str) -> Iterator[list[Shipped]]:
    """While open, launches are written to the yielded list as that architecture would run them; tensors may be meta."""
    global _recorded
    before, forced = _recorded, gpu.forced_architecture
    _recorded, gpu.forced_architecture = [], arch
    try:
        yield _recorded
    finally:
        _recorded, gpu.forced_architecture = before, forced


def _describe(
    kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any], name: str, warps: int, stages: int, exempt: str
) -> Shipped:
    """Types and alignment as the JIT would find them: an integer of 1 becomes a constant, fresh tensors are aligned."""
    named = dict(zip(kernel.arg_names, arguments, strict=False))
    ones = {key: 1 for key, value in named.items() if isinstance(value, int) and value == 1}
    rest = {key: value for key, value in named.items() if key not in ones}
    return Shipped(
        name=name,
        kernel=kernel,
        arguments={key: _type(value) for key, value in rest.items()},
        constants={**ones, **constants},
        aligned=tuple(key for key, value in rest.items() if isinstance(value, Tensor) or _divides(value)),
        num_warps=warps,
        num_stages=stages,
        exempt=exempt,
    )


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if abs(value) < 2**31 else "i64"


def _divides(value: Any) -> bool:
    return isinstance(value, int) and value % 16 == 0
