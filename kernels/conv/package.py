"""The package causal-conv1d as a backend: CUDA kernels of the same operation.

It is asked for by name only. What it cannot do is refused, and nothing else runs in its place.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from ssmorph.errors import fail

TYPES = (torch.float16, torch.bfloat16, torch.float32)
# the kernels read this many channels at once
ALIGNED = 8


def refuses_package(device: torch.device) -> str | None:
    """Why the package cannot run on the device, or None where it can; imports it where it is installed."""
    return _broken() or (None if device.type == "cuda" else "causal_conv1d needs a GPU")


@functools.cache
def _broken() -> str | None:
    if importlib.util.find_spec("causal_conv1d") is None:
        return "the package causal-conv1d is not installed"
    try:
        _functions()
    except Exception as error:  # an extension built for another torch may raise anything
        return f"causal_conv1d is installed but does not import: {type(error).__name__}: {error}"
    return None


def _functions() -> tuple[Any, Any]:
    package = importlib.import_module("causal_conv1d")
    return package.causal_conv1d_fn, package.causal_conv1d_update


def conv_package(
    x_BLC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, silu: bool, past_BKC: Tensor | None,
    segment_BL: Tensor | None,
) -> Tensor:  # fmt: skip
    """As `causal_conv`, but not packed documents together with a past."""
    if past_BKC is not None and segment_BL is not None:
        do = "Use backend 'triton' or 'chunked'."
        raise fail("causal_conv.backend", "'causal_conv1d' takes a past or packed documents, not both", "both", do)
    _check("causal_conv", x_BLC)
    y_BCL: Tensor = _functions()[0](
        _channels_last(x_BLC),
        weight_CK.contiguous(),
        bias_C,
        seq_idx=None if segment_BL is None else segment_BL.to(torch.int32).contiguous(),
        initial_states=None if past_BKC is None else past_BKC.to(x_BLC.dtype).contiguous().transpose(1, 2),
        activation="silu" if silu else None,
    )
    return y_BCL.transpose(1, 2)


@torch.no_grad()
def step_package(past_BKC: Tensor, x_BC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, silu: bool) -> Tensor:
    """As `causal_conv_step`, for a past of the dtype of x."""
    _check("causal_conv_step", x_BC)
    if past_BKC.dtype != x_BC.dtype:
        rule = f"'causal_conv1d' needs {x_BC.dtype}, as x"
        raise fail("causal_conv_step.past_BKC", rule, past_BKC.dtype, "Use what last_inputs returned.")
    activation = "silu" if silu else None
    y_BC: Tensor = _functions()[1](
        x_BC.contiguous(), past_BKC.transpose(1, 2), weight_CK.contiguous(), bias_C, activation
    )
    return y_BC


def _check(op: str, x: Tensor) -> None:
    if x.dtype not in TYPES:
        raise fail(f"{op}.backend", "'causal_conv1d' computes in float32", x.dtype, "Use backend 'chunked'.")
    if x.shape[-1] % ALIGNED:
        rule = f"'causal_conv1d' needs a multiple of {ALIGNED} channels"
        raise fail(f"{op}.backend", rule, x.shape[-1], "Use backend 'triton' or 'chunked'.")


def _channels_last(x_BLC: Tensor) -> Tensor:
    """[B, C, L] whose channels lie side by side, in rows that begin at multiples of what the kernels read at once."""
    aligned = x_BLC.stride(2) == 1 and all(stride % ALIGNED == 0 for stride in x_BLC.stride()[:2])
    return (x_BLC if aligned else x_BLC.contiguous()).transpose(1, 2)
