"""The gated group norm on a GPU: one kernel forwards, one backwards, every tensor read once.

With u = y silu(z), r = 1 / rms(u) and v = weight dout, all over one group of W channels:

    out = weight u r        du = r (v - u r^2 mean(u v))        dy = du silu(z)        dz = du y silu'(z)

B batch, L length, R = B x L rows, G groups, E = G x W channels.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssmorph.errors import fail

from ..common.gpu import architecture
from ..common.launch import launch, recorded
from ..common.shipped import Shipped

WIDEST = 1024
# elements of a tile and warps
CONFIGS = {"sm_80": (2048, 4), "sm_90": (2048, 4), "gfx942": (2048, 4)}
# tiles of rows whose share of dweight one program sums
TILES = 8


@triton.jit
def _gated(y_ptr, gate_ptr, row, column, inside, y_r, gate_r, GATE: tl.constexpr):
    """y, z, sigmoid(z) and u = y z sigmoid(z); the last is y without a gate."""
    y = tl.load(y_ptr + row * y_r + column, mask=inside, other=0.0).to(tl.float32)
    z, sigmoid, gated = y, y, y
    if GATE:
        z = tl.load(gate_ptr + row * gate_r + column, mask=inside, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * z))
        gated = y * z * sigmoid
    return y, z, sigmoid, gated


@triton.jit
def forward_kernel(
    y_ptr, gate_ptr, weight_ptr, out_ptr, rows, channels, y_r, gate_r, eps,
    W: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_R: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """BLOCK_R rows of one group."""
    row = (tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    w = tl.arange(0, BLOCK_W)[None, :]
    column = tl.program_id(1) * W + w
    inside = (row < rows) & (w < W)
    _, _, _, gated = _gated(y_ptr, gate_ptr, row, column, inside, y_r, gate_r, GATE)
    inverse = tl.rsqrt(tl.sum(gated * gated, 1) / W + eps)[:, None]
    weight = tl.load(weight_ptr + column, mask=w < W, other=0.0).to(tl.float32)
    out = gated * inverse * weight
    tl.store(out_ptr + row * channels + column, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    y_ptr, gate_ptr, weight_ptr, dout_ptr, dy_ptr, dgate_ptr, parts_ptr, rows, channels, y_r, gate_r, dout_r, eps,
    W: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_R: tl.constexpr, TILES: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """TILES x BLOCK_R rows of one group, and their share of dweight."""
    w = tl.arange(0, BLOCK_W)[None, :]
    column = tl.program_id(1) * W + w
    weight = tl.load(weight_ptr + column, mask=w < W, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_R, BLOCK_W), tl.float32)
    for i in range(0, TILES):
        row = ((tl.program_id(0).to(tl.int64) * TILES + i) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
        inside = (row < rows) & (w < W)
        y, z, sigmoid, gated = _gated(y_ptr, gate_ptr, row, column, inside, y_r, gate_r, GATE)
        dout = tl.load(dout_ptr + row * dout_r + column, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(gated * gated, 1) / W + eps)[:, None]
        normed = gated * inverse
        dweight += dout * normed
        dout *= weight
        dgated = inverse * (dout - normed * (tl.sum(dout * normed, 1) / W)[:, None])
        if GATE:
            dz = dgated * y * sigmoid * (1.0 + z * (1.0 - sigmoid))
            tl.store(dgate_ptr + row * channels + column, dz.to(dgate_ptr.dtype.element_ty), mask=inside)
            dgated *= z * sigmoid
        tl.store(dy_ptr + row * channels + column, dgated.to(dy_ptr.dtype.element_ty), mask=inside)
    at = tl.program_id(0).to(tl.int64) * channels + tl.program_id(1) * W + tl.arange(0, BLOCK_W)
    tl.store(parts_ptr + at, tl.sum(dweight, 0), mask=tl.arange(0, BLOCK_W) < W)


def norm_triton(y_BLE: Tensor, gate_BLE: Tensor | None, weight_E: Tensor, groups: int, eps: float) -> Tensor:
    """As `gated_group_norm`, for groups of up to 1024 channels."""
    width = y_BLE.shape[-1] // groups
    if width > WIDEST:
        rule = f"'triton' holds groups of up to {WIDEST} channels"
        raise fail("gated_group_norm.backend", rule, width, "Use backend 'chunked'.")
    if y_BLE.dtype == torch.float64:
        raise fail("gated_group_norm.backend", "'triton' computes in float32", y_BLE.dtype, "Use backend 'chunked'.")
    y_RE, gate_RE = _rows(y_BLE), None if gate_BLE is None else _rows(gate_BLE)
    out_RE: Tensor = _Norm.apply(y_RE, gate_RE, weight_E.contiguous(), groups, eps)
    return out_RE.view(y_BLE.shape)


def _rows(t: Tensor) -> Tensor:
    """[R, E] with unit stride in the last dimension, a view where the layout allows it."""
    rows = t.reshape(-1, t.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _tile(width: int, device: torch.device) -> tuple[dict[str, Any], int]:
    """The tile of a group's width, and its warps."""
    size, warps = CONFIGS[architecture(device)]
    block = triton.next_power_of_2(width)
    return {"W": width, "BLOCK_W": block, "BLOCK_R": max(1, size // block)}, warps


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, gate, weight, groups, eps):
        (rows, channels), (tile, warps) = y.shape, _tile(y.shape[1] // groups, y.device)
        out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        z = y if gate is None else gate
        launch(
            forward_kernel, (triton.cdiv(rows, tile["BLOCK_R"]), groups), y, z, weight, out, rows, channels,
            y.stride(0), z.stride(0), eps, **tile, GATE=gate is not None,
            name=f"norm.forward W={tile['W']}", warps=warps, stages=1,
        )  # fmt: skip
        ctx.save_for_backward(y, gate, weight)
        ctx.groups, ctx.eps = groups, eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        y, gate, weight = ctx.saved_tensors
        (rows, channels), (tile, warps) = y.shape, _tile(y.shape[1] // ctx.groups, y.device)
        programs = triton.cdiv(rows, TILES * tile["BLOCK_R"])
        z, dout = y if gate is None else gate, _rows(dout)
        dy, dgate = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (y, z))
        parts = torch.empty(programs, channels, dtype=torch.float32, device=y.device)
        launch(
            backward_kernel, (programs, ctx.groups), y, z, weight, dout, dy, dgate, parts, rows, channels,
            y.stride(0), z.stride(0), dout.stride(0), ctx.eps, **tile, TILES=TILES, GATE=gate is not None,
            name=f"norm.backward W={tile['W']}", warps=warps, stages=1,
        )  # fmt: skip
        return dy, None if gate is None else dgate, parts.sum(0).to(weight.dtype), None, None


def shipped(arch: str, dtype: str) -> list[Shipped]:
    """A step of training with a gate, for groups of one head and of a whole layer."""
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    with recorded(arch) as kernels:
        for width in (64, 128, 1024):
            y, gate = (torch.empty(4096, 2048, dtype=kind, device="meta", requires_grad=True) for _ in range(2))
            weight = torch.empty(2048, dtype=kind, device="meta", requires_grad=True)
            out = norm_triton(y, gate, weight, 2048 // width, 1e-5)
            out.backward(torch.empty_like(out))
    return kernels
