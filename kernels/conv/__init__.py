"""Causal depthwise convolution over a few tokens, and its one-token step. B batch, L length, C channels, K width."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmorph.errors import fail

from ..common.dispatch import Backends
from ..common.gpu import refuses_triton
from .package import refuses_package

_REFUSES = {"triton": refuses_triton, "causal_conv1d": refuses_package}
BACKENDS = Backends(
    "causal_conv",
    {
        "chunked": "ssmorph.kernels.conv.chunked:conv_chunked",
        "reference": "ssmorph.kernels.conv.reference:conv_reference",
        "triton": "ssmorph.kernels.conv.triton:conv_triton",
        "causal_conv1d": "ssmorph.kernels.conv.package:conv_package",
    },
    refuses=_REFUSES,
    on_gpu="triton",
)
STEPS = Backends(
    "causal_conv_step",
    {
        "chunked": "ssmorph.kernels.conv.chunked:step_chunked",
        "reference": "ssmorph.kernels.conv.reference:step_reference",
        "triton": "ssmorph.kernels.conv.triton:step_triton",
        "causal_conv1d": "ssmorph.kernels.conv.package:step_package",
    },
    refuses=_REFUSES,
    on_gpu="triton",
)


def causal_conv(
    x_BLC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None = None,
    *,
    silu: bool = False,
    past_BKC: Tensor | None = None,
    segment_BL: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y_t = bias + sum_k weight[:, k] x_{t-K+1+k}, then SiLU where asked; [B, L, C] in the dtype of x.

    Sums are taken in float32 (float64 for float64). `last_inputs` has what the next call needs as its past.

    Args:
        past_BKC: the K-1 inputs before the first one, of the same document as it; zeros where left out.
        segment_BL: document of each token, ascending; taps never reach across a border.
        backend: a name of `BACKENDS`; left out, the best for the device.

    Raises:
        ValueError: shapes that disagree, an unknown backend or one that cannot run here or cannot do what is asked.
    """
    _check("causal_conv", "x_BLC", x_BLC, weight_CK, bias_C, past_BKC)
    if segment_BL is not None and (segment_BL.shape != x_BLC.shape[:2] or segment_BL.is_floating_point()):
        rule, got = f"must be integers of shape {tuple(x_BLC.shape[:2])}", (tuple(segment_BL.shape), segment_BL.dtype)
        raise fail("causal_conv.segment_BL", rule, got, "Give the document of each token.")
    conv = BACKENDS.load(backend, x_BLC.device)
    y_BLC: Tensor = conv(x_BLC, weight_CK, bias_C, silu, past_BKC, segment_BL)
    return y_BLC


def last_inputs(x_BLC: Tensor, width: int, past_BKC: Tensor | None = None, segment_BL: Tensor | None = None) -> Tensor:
    """The past of the token that follows: the last K-1 inputs [B, K-1, C], zero before its document begins."""
    keep, length = width - 1, x_BLC.shape[1]
    past = x_BLC.new_zeros(x_BLC.shape[0], keep, x_BLC.shape[2]) if past_BKC is None else past_BKC.to(x_BLC.dtype)
    last_BKC = torch.cat([past, x_BLC[:, max(length - keep, 0) :]], dim=1)[:, -keep:]
    if segment_BL is None:
        return last_BKC.clone()
    # the past belongs to the document of the first token
    place = torch.arange(length - keep, length, device=x_BLC.device).clamp_min(0)
    other_BK = segment_BL[:, place] != segment_BL[:, -1:]
    return last_BKC.masked_fill(other_BK.unsqueeze(-1), 0)


def causal_conv_step(
    past_BKC: Tensor,
    x_BC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None = None,
    *,
    silu: bool = False,
    backend: str | None = None,
) -> Tensor:
    """One token of `causal_conv`, without gradients: shifts the K-1 past inputs in place and returns y [B, C].

    Raises:
        ValueError: as `causal_conv`.
    """
    _check("causal_conv_step", "x_BC", x_BC, weight_CK, bias_C, past_BKC)
    y_BC: Tensor = STEPS.load(backend, x_BC.device)(past_BKC, x_BC, weight_CK, bias_C, silu)
    return y_BC


def _check(op: str, name: str, x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None) -> None:
    dims = name.rsplit("_", 1)[1]
    if x.ndim != len(dims) or not x.is_floating_point():
        rule, got = f"must be floating point [{', '.join(dims)}]", (tuple(x.shape), x.dtype)
        raise fail(f"{op}.{name}", rule, got, "Put the channels last.")
    batch, channels = x.shape[0], x.shape[-1]
    if weight.ndim != 2 or weight.shape[0] != channels:
        raise fail(f"{op}.weight_CK", f"needs {channels} channels", tuple(weight.shape), "Give one row per channel.")
    width = weight.shape[1]
    if not 2 <= width <= 4:
        raise fail(f"{op}.weight_CK", "needs a width of 2 to 4", width, "Use another convolution.")
    if bias is not None and tuple(bias.shape) != (channels,):
        raise fail(f"{op}.bias_C", f"needs {channels} channels", tuple(bias.shape), "Give one value per channel.")
    if past is not None and tuple(past.shape) != (batch, width - 1, channels):
        rule = f"holds the {width - 1} inputs before, shape {(batch, width - 1, channels)}"
        raise fail(f"{op}.past_BKC", rule, tuple(past.shape), "Keep K-1 inputs.")
    for other, t in (("weight_CK", weight), ("bias_C", bias), ("past_BKC", past)):
        if t is not None and not t.is_floating_point():
            raise fail(f"{op}.{other}", "must be floating point", t.dtype, "Convert it.")
