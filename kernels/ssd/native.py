"""The scan in C on a CPU: native.c with its sizes and addresses, as an operation with gradients."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common.native import View, call, fill, inner_contiguous

SOURCE = "ssd/native.c"


class _Problem(ctypes.Structure):
    """As in native.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "length", "heads", "groups", "width", "state")),
        *((name, View) for name in ("x", "log_a", "B", "C", "w", "dy")),
        *((name, ctypes.c_void_p) for name in ("D", "initial", "dfinal", "segment", "y", "final")),
        *((name, ctypes.c_void_p) for name in ("dx", "dlog_a", "dB", "dC", "dw", "dD", "dinitial")),
    ]


def ssd_native(
    x_BLHP: Tensor, log_a_BLH: Tensor, B_BLGN: Tensor, C_BLGN: Tensor, w_BLH: Tensor | None, D_H: Tensor | None,
    state_BHPN: Tensor | None, segment_BL: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`ssd` in float32, or in float64 where x is."""
    work = torch.promote_types(x_BLHP.dtype, torch.float32)
    floats = [None if t is None else t.to(work) for t in (x_BLHP, log_a_BLH, B_BLGN, C_BLGN, w_BLH, D_H, state_BHPN)]
    y_BLHP, final_BHPN = _Scan.apply(*floats, None if segment_BL is None else segment_BL.long().contiguous())
    return y_BLHP.to(x_BLHP.dtype), final_BHPN


def ssd_step_native(
    state_BHPN: Tensor, x_BHP: Tensor, log_a_BH: Tensor, B_BGN: Tensor, C_BGN: Tensor, w_BH: Tensor | None,
    D_H: Tensor | None,
) -> Tensor:  # fmt: skip
    """`ssd_step`, in the dtype of the state."""
    work = state_BHPN.dtype
    # with the length of 1 that the views expect
    x, log_a, B, C = (t.detach().to(work).unsqueeze(1) for t in (x_BHP, log_a_BH, B_BGN, C_BGN))
    w = None if w_BH is None else w_BH.detach().to(work).unsqueeze(1)
    D = None if D_H is None else D_H.detach().to(work)
    # a state that is no block of memory is updated as a copy, and the copy put back
    state = state_BHPN if state_BHPN.is_contiguous() else state_BHPN.contiguous()
    y_BHP = torch.empty(x_BHP.shape, dtype=work)
    inputs = _inputs(x, log_a, B, C, w, D)
    call(SOURCE, "ssd_step", _problem(inputs, y=y_BHP, final=state), work, x_BHP.shape[0] * x_BHP.shape[1])
    if state is not state_BHPN:
        state_BHPN.copy_(state)
    return y_BHP.to(x_BHP.dtype)


def _inputs(
    x: Tensor, log_a: Tensor, B: Tensor, C: Tensor, w: Tensor | None, D: Tensor | None
) -> dict[str, Tensor | None]:
    x, B, C = (inner_contiguous(t) for t in (x, B, C))
    return {"x": x, "log_a": log_a, "B": B, "C": C, "w": w, "D": None if D is None else D.contiguous()}


def _problem(inputs: dict[str, Tensor | None], **more: Tensor | None) -> _Problem:
    x, B = inputs["x"], inputs["B"]
    assert x is not None
    assert B is not None
    problem = _Problem(*x.shape[:3], B.shape[2], x.shape[3], B.shape[3])
    fill(problem, inputs | more)
    return problem


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, log_a, B, C, w, D, initial, segment):  # type: ignore[no-untyped-def]
        inputs = _inputs(x, log_a, B, C, w, D)
        initial = None if initial is None else initial.contiguous()
        batch, _, heads, width = x.shape
        y = torch.empty(x.shape, dtype=x.dtype)
        final = torch.empty(batch, heads, width, B.shape[3], dtype=x.dtype)
        problem = _problem(inputs, initial=initial, segment=segment, y=y, final=final)
        call(SOURCE, "ssd_forward", problem, x.dtype, batch * heads)
        ctx.save_for_backward(*inputs.values(), initial, segment)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal):  # type: ignore[no-untyped-def]
        *saved, initial, segment = ctx.saved_tensors
        inputs = dict(zip(("x", "log_a", "B", "C", "w", "D"), saved, strict=True))
        x, B, w, D = (inputs[name] for name in ("x", "B", "w", "D"))
        dx, dlog_a, dB, dC = (torch.empty(t.shape, dtype=t.dtype) for t in saved[:4])
        dw, dinitial = (None if t is None else torch.empty(t.shape, dtype=t.dtype) for t in (w, initial))
        dD_BH = None if D is None else torch.empty(x.shape[0], x.shape[2], dtype=x.dtype)
        dy, dfinal = inner_contiguous(dy), dfinal.contiguous()
        problem = _problem(
            inputs, dy=dy, initial=initial, dfinal=dfinal, segment=segment, dx=dx, dlog_a=dlog_a, dB=dB, dC=dC, dw=dw,
            dD=dD_BH, dinitial=dinitial,
        )  # fmt: skip
        call(SOURCE, "ssd_backward", problem, x.dtype, x.shape[0] * B.shape[2])
        return dx, dlog_a, dB, dC, dw, None if dD_BH is None else dD_BH.sum(0), dinitial, None
