"""Launches the Triton mixing losses: statistics of rows, gradients by rows, gradients by columns.

As in chunked.py the gradients come with the loss, and d log_a = reverse-cumsum(<C, dC> - <B, dB>) is taken from the
float32 sums. B batch, L length, H heads, N state width, K key width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssmorph.errors import fail

from ..common.gpu import precision
from ..common.launch import launch, recorded
from ..common.rows import Launch, row_for
from ..common.shipped import Shipped
from .teacher import Teacher
from .triton_kernels import columns_kernel, rows_kernel, statistics_kernel
from .triton_plan import LAUNCHES

LOG2E, LEAST = math.log2(math.e), -150.0


def mixing_triton(
    C_BLHN: Tensor,
    B_BLHN: Tensor,
    log_a_BLH: Tensor,
    w_BLH: Tensor,
    D_H: Tensor,
    teacher: Teacher,
    valid_BL: Tensor | None,
    loss: str,
) -> Tensor:
    """The loss per head [H]. C with B, and q with k, are multiplied in the wider of their dtypes, sums in float32."""
    C, B = _alike(C_BLHN, B_BLHN)
    q, k = _alike(teacher.q_BLHK, teacher.k_BLHK)
    teacher = Teacher(q, k, teacher.scale, teacher.window, teacher.softcap, teacher.sinks_H)
    row = row_for(LAUNCHES, C, q, "mixing_loss", "widths up to {}", "Use backend 'chunked'.")
    loss_H: Tensor = _MixingLoss.apply(
        C, B, log_a_BLH, w_BLH, D_H, teacher, valid_BL, loss, row, torch.is_grad_enabled()
    )
    return loss_H


def _alike(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(one.dtype, other.dtype)
    if dtype == torch.float64:
        raise fail("mixing_loss.backend", "'triton' computes in float32", dtype, "Use backend 'chunked'.")
    return one.to(dtype).contiguous(), other.to(dtype).contiguous()


class _MixingLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, C, B, log_a, w, D, teacher, valid, loss, row, grads):  # type: ignore[no-untyped-def]
        want = grads and any(ctx.needs_input_grad[:5])
        batch, length, heads = log_a.shape
        if length == 0 or batch == 0:
            ctx.save_for_backward(*(torch.zeros_like(t) for t in (C, B, log_a, w, D)))
            return log_a.new_zeros(heads)
        loss_BH, grads_ = _Tiles(C, B, log_a, w, D, teacher, valid, loss == "cosine", row).run(want)
        # the loss is a mean: over rows for the cosine, over matrices for the norm
        rows = batch * length if valid is None else valid.sum().clamp(min=1)
        count = rows if loss == "cosine" else batch
        ctx.save_for_backward(*(t / count for t in grads_))
        return loss_BH.sum(0) / count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_H):  # type: ignore[no-untyped-def]
        *by_head, dD_H = ctx.saved_tensors
        scaled = (t * (grad_H[:, None].to(t.dtype) if t.ndim == 4 else grad_H) for t in by_head)
        return *scaled, dD_H * grad_H, None, None, None, None, None


class _Tiles:
    """One problem as the kernels take it."""

    def __init__(
        self, C: Tensor, B: Tensor, log_a: Tensor, w: Tensor, D: Tensor, teacher: Teacher, valid: Tensor | None,
        cosine: bool, row: Launch,
    ) -> None:  # fmt: skip
        self.C, self.B, self.teacher, self.D, self.cosine = C, B, teacher, D.float().contiguous(), cosine
        self.batch, self.length, self.heads = log_a.shape
        self.blocks, self.row = -(-self.length // row.rows), row
        # lines of one number per token reach to the end of the last block, so that the kernels load them unmasked
        spare = (0, -self.length % row.rows)
        self.w = F.pad(_by_head(w), spare)
        self.upto, rest = _decay_in_blocks(F.pad(_by_head(log_a), spare), row.rows)
        self.fade = rest.exp2()
        self.valid = self.upto if valid is None else F.pad(valid.to(torch.int32), spare).contiguous()
        cap = teacher.softcap
        scale = teacher.scale * LOG2E if cap is None else teacher.scale / cap
        N, K = C.shape[-1], teacher.q_BLHK.shape[-1]
        self.sizes = (
            self.length, self.heads, self.heads * N, self.heads * K, float(scale), float((cap or 0.0) * LOG2E),
            teacher.window or 0,
        )  # fmt: skip
        self.constants: dict[str, Any] = {
            "N": N, "K": K, "BLOCK_N": _block(N), "BLOCK_K": _block(K), "Q": row.rows, "COSINE": cosine,
            "CAPPED": cap is not None, "WINDOW": teacher.window is not None, "PADDED": valid is not None,
            "PRECISION": precision(C.device, C, teacher.q_BLHK),
        }  # fmt: skip

    def run(self, want: bool) -> tuple[Tensor, list[Tensor]]:
        """The loss [B, H], and where wanted its gradients for C, B, log_a, w (of one batch entry each) and D."""
        teacher = self.teacher
        shift, alpha, beta, level, gain, read, dw = self.upto.new_empty(7, *self.upto.shape)
        parts = self.upto.new_empty(self.batch, self.heads, self.blocks)
        inputs = (self.C, self.B, teacher.q_BLHK, teacher.k_BLHK, self.upto, self.w * self.fade, self.w, self.D)
        sinks = None if teacher.sinks_H is None else teacher.sinks_H.float() * LOG2E
        self._launch(
            "statistics", statistics_kernel, *inputs, self.D if sinks is None else sinks, self.valid, shift, alpha,
            beta, level, gain, parts, SINK=sinks is not None,
        )  # fmt: skip
        more = (*inputs, self.valid, shift, alpha, beta)
        dC, dB = (torch.empty_like(t) if want else t for t in (self.C, self.B))
        skip = torch.empty_like(parts)
        if want or not self.cosine:
            self._launch("rows", rows_kernel, *more, dC, read, skip, parts, WANT=want)
        total = parts.sum(-1)
        if not self.cosine:
            total = total.sqrt()
        if not want:
            return total, []
        self._launch("columns", columns_kernel, *more, self.fade, level, gain, dB, dw)
        change = (read - self.w * dw)[..., : self.length].double()
        dlog_a = change.flip(-1).cumsum(-1).flip(-1)
        dlog_a[..., 0] = 0  # nothing comes before the first token; the sum leaves rounding there
        dD_BH = skip.sum(-1)
        by_head = [dlog_a.float().transpose(1, 2), dw[..., : self.length].transpose(1, 2)]
        if not self.cosine:
            factor = torch.where(total > 0, 1 / total, 0)
            dC, dB = (t.mul_(factor[:, None, :, None]) for t in (dC, dB))
            by_head = [t * factor[:, None] for t in by_head]
            dD_BH = dD_BH * factor
        return total, [dC, dB, *by_head, dD_BH.sum(0)]

    def _launch(self, name: str, kernel: Any, *tensors: Tensor, **constants: bool) -> None:
        width = f"N={self.constants['N']} K={self.constants['K']}"
        row = self.row
        launch(
            kernel, (self.blocks, self.batch * self.heads), *tensors, *self.sizes, **self.constants, **constants,
            name=f"mixing.{name} {'cosine' if self.cosine else 'frobenius'} {width}", warps=row.warps,
            stages=row.stages, exempt=row.exempt,
        )  # fmt: skip


def _by_head(t_BLH: Tensor) -> Tensor:
    return t_BLH.float().transpose(1, 2).contiguous()


def _block(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


def _decay_in_blocks(log_a_BHL: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """log2 of the decay from the start of each token's block to the token, and from the token to the block's end."""
    # 2^LEAST is 0 in float32, and a cumulative sum of more would blur the decays of the tokens after it
    blocks = (log_a_BHL * LOG2E).clamp(min=LEAST).unflatten(-1, (-1, rows))
    later = F.pad(blocks[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)
    return blocks.cumsum(-1).flatten(-2), later.flatten(-2)


def shipped(arch: str, dtype: str) -> list[Shipped]:
    """Both losses with gradients, for the usual widths."""
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    with recorded(arch) as kernels:
        for row in LAUNCHES[arch, kinds[dtype].itemsize]:
            for loss in ("frobenius", "cosine"):
                _record(row.key, kinds[dtype], loss)
    return kernels


def _record(width: int, dtype: torch.dtype, loss: str) -> None:
    """One step on tensors without data."""
    wide = torch.empty(2, 2048, 16, width, dtype=dtype, device="meta")
    narrow = torch.empty(2, 2048, 16, device="meta")
    C = wide.clone().requires_grad_()
    mixing_triton(C, wide, narrow, narrow, narrow[0, 0], Teacher(wide, wide, 0.125), None, loss)
