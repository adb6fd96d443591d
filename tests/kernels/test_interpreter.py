"""Triton's interpreter as the kernel tests use it: bfloat16 computes in float32 and rounds to nearest even."""

from __future__ import annotations

import os

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels are compiled here, not interpreted", allow_module_level=True)
tl = triton.language


@triton.jit
def _arithmetic(a_ptr, b_ptr, out_ptr, dot_ptr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    offset = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    a, b = tl.load(a_ptr + offset), tl.load(b_ptr + offset)
    tl.store(out_ptr + offset, tl.where(a > b, a * b + a, a - b))
    tl.store(dot_ptr + offset, tl.dot(a, b))


def test_bfloat16_arithmetic_equals_torch() -> None:
    a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    out, dot = torch.empty_like(a), torch.empty(16, 16)
    _arithmetic[(1,)](a, b, out, dot, SIZE=16)
    assert torch.equal(out, torch.where(a > b, a * b + a, a - b))
    assert torch.allclose(dot, a.float() @ b.float(), rtol=1e-6, atol=1e-6)


def test_float32_rounds_to_nearest_even() -> None:
    values = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.14159] * 4)
    from .interpreter import narrow, widen

    rounded = torch.from_numpy(widen(narrow(values.numpy())))
    assert torch.equal(rounded, values.bfloat16().float())
