"""The causal convolution as shifted sums: what the other backends are tested against.

    y_t = bias + sum_k weight[:, k] x_{t-K+1+k}      over the k for which that token is in the document of token t

B batch, L length, C channels, K width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def conv_reference(
    x_BLC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, silu: bool, past_BKC: Tensor | None,
    segment_BL: Tensor | None,
) -> Tensor:  # fmt: skip
    """As `causal_conv`."""
    batch, length, channels = x_BLC.shape
    width, work = weight_CK.shape[1], torch.promote_types(x_BLC.dtype, torch.float32)
    past = x_BLC.new_zeros(batch, width - 1, channels) if past_BKC is None else past_BKC
    inputs = torch.cat([past.to(work), x_BLC.to(work)], dim=1)
    segment = x_BLC.new_zeros(batch, length) if segment_BL is None else segment_BL
    # the past belongs to the document of the first token
    documents = torch.cat([segment[:, :1].expand(batch, width - 1), segment], dim=1)
    y = inputs.new_zeros(batch, length, channels)
    for k in range(width):
        same = documents[:, k : k + length] == segment
        y = y + torch.where(same.unsqueeze(-1), inputs[:, k : k + length] * weight_CK[:, k].to(work), 0)
    if bias_C is not None:
        y = y + bias_C.to(work)
    return (F.silu(y) if silu else y).to(x_BLC.dtype)


@torch.no_grad()
def step_reference(past_BKC: Tensor, x_BC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, silu: bool) -> Tensor:
    """As `causal_conv_step`: the last output of the past and one token."""
    y_BLC = conv_reference(x_BC.unsqueeze(1), weight_CK, bias_C, silu, past_BKC, None)
    past_BKC.copy_(torch.cat([past_BKC.to(x_BC.dtype), x_BC.unsqueeze(1)], dim=1)[:, 1:])
    return y_BLC[:, 0]
