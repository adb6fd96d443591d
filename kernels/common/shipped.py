"""What ahead-of-time compilation needs to know of a kernel: its arguments as the launcher gives them.

Every Triton module lists its kernels with `shipped(arch, dtype)`, in each configuration that its launcher can choose
there; benchmarks/compile.py compiles them without a device and counts registers, spills and shared memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Shipped:
    """One kernel in one configuration.

    Attributes:
        name: operation, kernel and sizes, as the table prints them: 'ssd.scan P=64 N=64'.
        kernel: the @triton.jit function.
        arguments: every argument that is not constexpr -> its type: '*bf16', '*fp32', 'i32', 'i64', 'fp32'.
        aligned: those whose address or value is a multiple of 16 at every usual size, as the JIT would find out.
        constants: every constexpr -> its value. An integer argument that is always 1 belongs here too.
        exempt: why it need not fit twice on a multiprocessor; empty where it must.
    """

    name: str
    kernel: Any
    arguments: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: tuple[str, ...]
    num_warps: int
    num_stages: int
    exempt: str = ""
