"""The mixing losses in C on a CPU: native.c with its sizes and addresses, as an operation with gradients."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common.native import View, call, fill, inner_contiguous
from .teacher import Teacher

SOURCE = "mixing/native.c"
_GRADIENTS = ("dC", "dB", "dlog_a", "dw", "dD")


class _Problem(ctypes.Structure):
    """As in native.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "length", "heads", "width", "key_width", "window")),
        *((name, ctypes.c_int64) for name in ("cosine", "gradients")),
        *((name, ctypes.c_double) for name in ("scale", "softcap")),
        *((name, View) for name in ("C", "B", "log_a", "w", "q", "k")),
        *((name, ctypes.c_void_p) for name in ("D", "sinks", "valid", "loss", *_GRADIENTS)),
    ]


def mixing_native(
    C_BLHN: Tensor, B_BLHN: Tensor, log_a_BLH: Tensor, w_BLH: Tensor, D_H: Tensor, teacher: Teacher,
    valid_BL: Tensor | None, loss: str,
) -> Tensor:  # fmt: skip
    """The loss per head [H], in the dtype of log_a: float32 or float64."""
    C, B = C_BLHN.to(log_a_BLH.dtype), B_BLHN.to(log_a_BLH.dtype)
    apply: Callable[..., Tensor] = _MixingLoss.apply
    return apply(C, B, log_a_BLH, w_BLH, D_H, teacher, valid_BL, loss, torch.is_grad_enabled())


class _MixingLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, C, B, log_a, w, D, teacher, valid, loss, grads):  # type: ignore[no-untyped-def]
        want = grads and any(ctx.needs_input_grad[:5])
        batch, length, heads = log_a.shape
        dtype = log_a.dtype
        # padded tokens are passed over and keep their zeros
        make = torch.empty if valid is None else torch.zeros
        outs = [make(t.shape, dtype=dtype) for t in (C, B, log_a, w)] if want else []
        dD_BH, loss_BH = torch.zeros(batch, heads, dtype=dtype), torch.zeros(batch, heads, dtype=torch.float64)
        named: dict[str, Any] = {
            "C": C, "B": B, "log_a": log_a, "w": w, "q": teacher.q_BLHK.to(dtype), "k": teacher.k_BLHK.to(dtype),
        }  # fmt: skip
        named = {name: inner_contiguous(t) if t.ndim == 4 else t for name, t in named.items()}
        named |= {
            "D": D.contiguous(),
            "sinks": None if teacher.sinks_H is None else teacher.sinks_H.to(dtype).contiguous(),
            "valid": None if valid is None else valid.contiguous(),
            "loss": loss_BH,
            **dict(zip(_GRADIENTS, [*outs, dD_BH] if want else [None] * 5, strict=True)),
        }
        sizes = (batch, length, heads, C.shape[3], teacher.q_BLHK.shape[3], teacher.window or 0)
        problem = _Problem(*sizes, loss == "cosine", want, teacher.scale, teacher.softcap or 0.0)
        fill(problem, named)
        call(SOURCE, "mixing", problem, dtype, batch * heads)
        # the loss is a mean: over rows for the cosine, over matrices for the norm
        count = batch if loss == "frobenius" else batch * length if valid is None else int(valid.sum())
        ctx.count = max(count, 1)
        ctx.save_for_backward(*outs, dD_BH.sum(0))
        return (loss_BH.sum(0) / ctx.count).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_H):  # type: ignore[no-untyped-def]
        *outs, dD_H = ctx.saved_tensors
        share_H = grad_H / ctx.count
        return *(t * (share_H[:, None] if t.ndim == 4 else share_H) for t in outs), dD_H * share_H, *(None,) * 4
