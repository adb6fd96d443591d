"""Launches the Triton convolution: one kernel forwards, one backwards, one for a token of decoding.

B batch, L length, C channels, K width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssmorph.errors import fail

from ..common.gpu import architecture
from ..common.launch import launch, recorded
from ..common.shipped import Shipped
from .triton_kernels import backward_kernel, forward_kernel, step_kernel


@dataclass(frozen=True)
class Config:
    """Tile of the forward kernel [tokens, channels]; rows, tokens of a row and channels of the backward walk."""

    tokens: int = 32
    channels: int = 64
    rows: int = 8
    steps: int = 16
    walk_channels: int = 64
    warps: int = 4


CONFIGS = {"sm_80": Config(), "sm_90": Config(), "gfx942": Config()}
STEP_CHANNELS = 256


def conv_triton(
    x_BLC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, silu: bool, past_BKC: Tensor | None,
    segment_BL: Tensor | None,
) -> Tensor:  # fmt: skip
    """As `causal_conv`, summed in float32."""
    _check("causal_conv", x_BLC)
    past = None if past_BKC is None else past_BKC.to(x_BLC.dtype)
    segment = None if segment_BL is None else segment_BL.to(torch.int32).contiguous()
    y_BLC: Tensor = _Conv.apply(_rows(x_BLC), weight_CK.contiguous(), bias_C, past, segment, silu)
    return y_BLC


@torch.no_grad()
def step_triton(past_BKC: Tensor, x_BC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, silu: bool) -> Tensor:
    """As `causal_conv_step`."""
    _check("causal_conv_step", x_BC)
    x, weight = _rows(x_BC), weight_CK.contiguous()
    batch, channels = x.shape
    y = torch.empty(batch, channels, dtype=x.dtype, device=x.device)
    launch(
        step_kernel, (triton.cdiv(channels, STEP_CHANNELS), batch), past_BKC, x, weight, _or(bias_C, x), y, channels,
        *past_BKC.stride(), x.stride(0), K=weight.shape[1], BLOCK_C=STEP_CHANNELS, BIAS=bias_C is not None, SILU=silu,
        name=f"conv.step K={weight.shape[1]}", warps=4, stages=1,
    )  # fmt: skip
    return y


def _check(op: str, x: Tensor) -> None:
    if x.dtype == torch.float64:
        raise fail(f"{op}.backend", "'triton' computes in float32", x.dtype, "Use backend 'chunked'.")


def _rows(t: Tensor) -> Tensor:
    """With unit stride in the last dimension."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _or(t: Tensor | None, other: Tensor) -> Tensor:
    """A pointer that a kernel may be given but does not follow."""
    return other if t is None else t.contiguous()


def _shared(x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, segment: Tensor | None) -> list[Any]:
    return [x, weight, _or(bias, x), x if past is None else past, _or(segment, x)]


def _name(which: str, weight: Tensor, past: Tensor | None, segment: Tensor | None) -> str:
    """For tables."""
    return f"conv.{which} K={weight.shape[1]}{' past' * (past is not None)}{' packed' * (segment is not None)}"


def _flags(
    weight: Tensor, bias: Tensor | None, past: Tensor | None, segment: Tensor | None, silu: bool
) -> dict[str, Any]:
    there = {"BIAS": bias is not None, "PAST": past is not None, "SEGMENTS": segment is not None}
    return {"K": weight.shape[1], "SILU": silu, **there}


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, past, segment, silu):  # type: ignore[no-untyped-def]
        (batch, length, channels), config = x.shape, CONFIGS[architecture(x.device)]
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grid = (triton.cdiv(length, config.tokens), triton.cdiv(channels, config.channels), batch)
        strides = (*x.stride()[:2], *(x if past is None else past).stride())
        launch(
            forward_kernel, grid, *_shared(x, weight, bias, past, segment), y, length, channels, *strides,
            BLOCK_T=config.tokens, BLOCK_C=config.channels, **_flags(weight, bias, past, segment, silu),
            name=_name("forward", weight, past, segment), warps=config.warps, stages=1,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, past, segment)
        ctx.silu = silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, weight, bias, past, segment = ctx.saved_tensors
        (batch, length, channels), width, config = x.shape, weight.shape[1], CONFIGS[architecture(x.device)]
        dy, dx = _rows(dy), torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dpast = None if past is None else torch.empty(past.shape, dtype=past.dtype, device=x.device)
        sections = triton.cdiv(length, config.rows * config.steps)
        parts = torch.empty(batch, sections, width + 1, channels, dtype=torch.float32, device=x.device)
        strides = (*x.stride()[:2], *(x if past is None else past).stride(), *dy.stride()[:2])
        launch(
            backward_kernel, (sections, triton.cdiv(channels, config.walk_channels), batch),
            *_shared(x, weight, bias, past, segment), dy, dx, _or(dpast, dx), parts, length, channels, *strides,
            ROWS=config.rows, STEPS=config.steps, BLOCK_C=config.walk_channels,
            **_flags(weight, bias, past, segment, ctx.silu),
            name=_name("backward", weight, past, segment), warps=config.warps, stages=1,
        )  # fmt: skip
        # by age of the tap, then the bias
        sums = parts.sum((0, 1))
        dweight = sums[:width].flip(0).t().to(weight.dtype)
        return dx, dweight, None if bias is None else sums[width].to(bias.dtype), dpast, None, None


def shipped(arch: str, dtype: str) -> list[Shipped]:
    """A step of training and a token of decoding at width 4: plain, and packed with a past."""
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    batch, length, channels, width = 2, 2048, 1536, 4
    weight, bias = (torch.empty(*size, dtype=kind, device="meta") for size in ((channels, width), (channels,)))
    past = torch.empty(batch, width - 1, channels, dtype=kind, device="meta")
    segment = torch.empty(batch, length, dtype=torch.int32, device="meta")
    with recorded(arch) as kernels:
        for options in ((None, None), (past, segment)):
            x = torch.empty(batch, length, channels, dtype=kind, device="meta", requires_grad=True)
            y = conv_triton(x, weight, bias, True, *options)
            y.backward(torch.empty_like(y))
        step_triton(past, x.detach()[:, 0], weight, bias, True)
    return kernels
