"""The gated group norm in torch, in blocks of rows that stay in the cache: what a CPU runs.

With u = y silu(z), r = 1 / rms(u) and v = weight dout, all over one group of W channels:

    out = weight u r        du = r (v - u r^2 mean(u v))        dy = du silu(z)        dz = du y silu'(z)

Only the inputs are kept for the backward pass. R rows of B x L, G groups, E = G x W channels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# elements of a block on a CPU: 1 MiB in float32
NORM_BLOCK = 2**18


def norm_chunked(y_BLE: Tensor, gate_BLE: Tensor | None, weight_E: Tensor, groups: int, eps: float) -> Tensor:
    """As `gated_group_norm`."""
    shape = (-1, groups, y_BLE.shape[-1] // groups)
    gate_RGW = None if gate_BLE is None else gate_BLE.reshape(shape)
    out_RGW: Tensor = _Norm.apply(y_BLE.reshape(shape), gate_RGW, weight_E.reshape(shape[1:]), eps)
    return out_RGW.view(y_BLE.shape)


def _blocks(y_RGW: Tensor) -> Iterator[slice]:
    rows, groups, width = y_RGW.shape
    size = max(1, NORM_BLOCK // (groups * width)) if y_RGW.device.type == "cpu" else max(1, rows)
    return (slice(first, min(first + size, rows)) for first in range(0, rows, size))


def _inverse_rms(gated_RGW: Tensor, eps: float) -> Tensor:
    """[R, G, 1]; a norm is one pass without a temporary."""
    squares = torch.linalg.vector_norm(gated_RGW, dim=-1, keepdim=True).square_()
    return squares.div_(gated_RGW.shape[-1]).add_(eps).rsqrt_()


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_RGW, gate_RGW, weight_GW, eps):  # type: ignore[no-untyped-def]
        work = torch.promote_types(y_RGW.dtype, torch.float32)
        weight = weight_GW.to(work)
        out_RGW = torch.empty(y_RGW.shape, dtype=y_RGW.dtype, device=y_RGW.device)
        for rows in _blocks(y_RGW):
            y = y_RGW[rows].to(work)
            gated = y if gate_RGW is None else F.silu(gate_RGW[rows].to(work)).mul_(y)
            torch.mul(gated * _inverse_rms(gated, eps), weight, out=out_RGW[rows])
        ctx.save_for_backward(y_RGW, gate_RGW, weight_GW)
        ctx.eps = eps
        return out_RGW

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_RGW):  # type: ignore[no-untyped-def]
        y_RGW, gate_RGW, weight_GW = ctx.saved_tensors
        work = torch.promote_types(y_RGW.dtype, torch.float32)
        dy_RGW = torch.empty(y_RGW.shape, dtype=y_RGW.dtype, device=y_RGW.device)
        dgate_RGW = None if gate_RGW is None else torch.empty(y_RGW.shape, dtype=gate_RGW.dtype, device=y_RGW.device)
        weight = weight_GW.to(work)
        dweight = torch.zeros_like(weight)
        for rows in _blocks(y_RGW):
            y, dout = y_RGW[rows].to(work), dout_RGW[rows].to(work)
            gate = None if gate_RGW is None else gate_RGW[rows].to(work)
            silu = 1 if gate is None else F.silu(gate)
            gated = y * silu
            inverse = _inverse_rms(gated, ctx.eps)
            normed = gated * inverse
            product = dout * normed
            dweight += product.sum(0)
            mean = product.mul_(weight).mean(-1, keepdim=True)
            dgated = normed.mul_(mean.neg_()).addcmul_(dout, weight).mul_(inverse)
            torch.mul(dgated, silu, out=dy_RGW[rows])
            if dgate_RGW is not None:
                dgate_RGW[rows] = torch.ops.aten.silu_backward(dgated.mul_(y), gate)
        return dy_RGW, dgate_RGW, dweight.to(weight_GW.dtype), None
