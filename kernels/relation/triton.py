"""Launches the Triton relation loss: one kernel for the log-sums of rows, one for the loss and its gradient.

As in chunked.py the gradient comes with the loss. It waits for the backward in float32 and as a sum over tokens: in a
half type a mean would vanish in long batches, and the sum at a token that all others look at would overflow.

B batch, L length, H relation heads, J and K widths of the student's and the teacher's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssmorph.errors import fail

from ..common.gpu import precision
from ..common.launch import launch, recorded
from ..common.rows import Launch, row_for
from ..common.shipped import Shipped
from .problem import Problem
from .triton_kernels import gradient_kernel, log_sums_kernel
from .triton_plan import LAUNCHES

LOG2E = math.log2(math.e)


def relation_triton(student_BLHJ: Tensor, problem: Problem) -> Tensor:
    """The loss per head [H]. Each side is multiplied in its own dtype, sums are in float32."""
    for t in (student_BLHJ, problem.teacher_BLHK):
        if t.dtype == torch.float64:
            raise fail("relation_loss.backend", "'triton' computes in float32", t.dtype, "Use backend 'chunked'.")
    what, do = "relation heads up to {} wide", "Use more heads, or backend 'chunked'."
    row = row_for(LAUNCHES, student_BLHJ, problem.teacher_BLHK, "relation_loss", what, do)
    loss_H: Tensor = _RelationLoss.apply(student_BLHJ, problem, row, torch.is_grad_enabled())
    return loss_H


class _RelationLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, problem, row, grads):  # type: ignore[no-untyped-def]
        batch, length, heads, _ = student.shape
        want, order_BL = grads and ctx.needs_input_grad[0], None
        ctx.tokens, ctx.dtype = problem.tokens, student.dtype
        if batch == 0 or length == 0:
            ctx.save_for_backward(student.new_zeros(student.shape))
            return student.new_zeros(heads, dtype=torch.float32)
        counts_B = torch.full((batch,), length, dtype=torch.int32, device=student.device)
        x, y = student, problem.teacher_BLHK
        if problem.valid_BL is not None:
            # tokens that count to the front, in their order: a causal mask needs no more than that
            order_BL = problem.valid_BL.logical_not().to(torch.int8).argsort(dim=1, stable=True)
            counts_B = problem.valid_BL.sum(1, dtype=torch.int32)
            x, y = (_taken(t, order_BL) for t in (x, y))
        loss_H, dX = _run(x.contiguous(), y.contiguous(), counts_B, problem, row, want)
        if order_BL is not None and want:
            dX = _taken(dX, order_BL.argsort(dim=1))
        ctx.save_for_backward(dX)
        return loss_H / ctx.tokens

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_H):  # type: ignore[no-untyped-def]
        (dX,) = ctx.saved_tensors
        return (dX * (grad_H / ctx.tokens)[:, None]).to(ctx.dtype), None, None, None


def _taken(t_BLHJ: Tensor, order_BL: Tensor) -> Tensor:
    """The tokens of every sequence in an order of its own."""
    return t_BLHJ.take_along_dim(order_BL[..., None, None], dim=1)


def _run(x: Tensor, y: Tensor, counts_B: Tensor, problem: Problem, row: Launch, want: bool) -> tuple[Tensor, Tensor]:
    """The sums over tokens of the loss [H] and, where wanted, of its gradient for x."""
    batch, length, heads, J = x.shape
    K, blocks = y.shape[-1], -(-length // row.rows)
    a_BHL, b_BHL = torch.empty(2, batch, heads, length, device=x.device)
    parts_BHZ = a_BHL.new_empty(batch, heads, blocks)
    dX = torch.empty(x.shape, device=x.device) if want else a_BHL
    sizes = (length, heads, heads * J, heads * K, problem.student_scale * LOG2E, problem.teacher_scale * LOG2E)
    constants: dict[str, Any] = {
        "J": J, "K": K, "BLOCK_J": _block(J), "BLOCK_K": _block(K), "Q": row.rows, "CAUSAL": problem.causal,
        "PRECISION": precision(x.device, x, y),
    }  # fmt: skip
    grid, what = (blocks, batch * heads), f"{'causal' if problem.causal else 'full'} J={J} K={K}"
    inputs = (x, y, counts_B, a_BHL, b_BHL)
    launch(
        log_sums_kernel, grid, *inputs, *sizes, **constants, name=f"relation.log_sums {what}", warps=row.warps,
        stages=row.stages,
    )  # fmt: skip
    launch(
        gradient_kernel, grid, *inputs, dX, parts_BHZ, *sizes, problem.student_scale, **constants, WANT=want,
        name=f"relation.gradient {what}", warps=row.warps, stages=row.stages,
    )  # fmt: skip
    return parts_BHZ.sum((0, 2)), dX


def _block(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


def shipped(arch: str, dtype: str) -> list[Shipped]:
    """Loss and gradient, causal and not, for the usual widths."""
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    with recorded(arch) as kernels:
        for width in (64, 128):
            x = torch.empty(2, 2048, 16, width, dtype=kind, device="meta")
            for causal in (True, False):
                relation_triton(x.clone().requires_grad_(), Problem(x, 0.125, 0.125, causal, None))
    return kernels
