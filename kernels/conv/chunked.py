"""The causal convolution in torch, in blocks of tokens that stay in the cache: what a CPU runs.

Forward, SiLU and every gradient of a block are computed while it is there; the backward pass keeps the inputs alone and
computes the sums again. Only blocks in which a document begins pay for masks.

B batch, L length, C channels, K width, S tokens of a block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# elements of a block on a CPU: 512 KiB in float32
CONV_BLOCK = 2**17


def conv_chunked(
    x_BLC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, silu: bool, past_BKC: Tensor | None,
    segment_BL: Tensor | None,
) -> Tensor:  # fmt: skip
    """As `causal_conv`."""
    y_BLC: Tensor = _Conv.apply(x_BLC, weight_CK, bias_C, past_BKC, segment_BL, silu)
    return y_BLC


@torch.no_grad()
def step_chunked(past_BKC: Tensor, x_BC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, silu: bool) -> Tensor:
    """As `causal_conv_step`."""
    work = torch.promote_types(x_BC.dtype, torch.float32)
    taps_BKC = torch.cat([past_BKC.to(x_BC.dtype), x_BC.unsqueeze(1)], dim=1)
    past_BKC.copy_(taps_BKC[:, 1:])
    y = torch.einsum("bkc,ck->bc", taps_BKC.to(work), weight_CK.to(work))
    if bias_C is not None:
        y = y + bias_C.to(work)
    return (F.silu(y) if silu else y).to(x_BC.dtype)


class _Inputs:
    """The inputs and their past, block by block, in the dtype that is computed in."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, segment: Tensor | None):
        self.work = torch.promote_types(x.dtype, torch.float32)
        self.x, self.segment = x, segment
        self.taps_KC = weight.to(self.work).t().contiguous()
        self.bias = None if bias is None else bias.to(self.work)
        self.keep = weight.shape[1] - 1
        past = x.new_zeros(x.shape[0], self.keep, x.shape[2]) if past is None else past
        self.past = past.to(self.work)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """First token and end of each block."""
        batch, length, channels = self.x.shape
        size = max(16, CONV_BLOCK // max(1, batch * channels)) if self.x.device.type == "cpu" else max(1, length)
        return ((first, min(first + size, length)) for first in range(0, length, size))

    def window(self, first: int, end: int) -> Tensor:
        """The inputs of a block and the K-1 before it, [B, K-1+S, C]."""
        before = self.keep - first
        inside = self.x[:, max(first - self.keep, 0) : end].to(self.work)
        return inside if before <= 0 else torch.cat([self.past[:, self.keep - before :], inside], dim=1)

    def documents(self, first: int, end: int) -> Tensor | None:
        """The document of each token of the window, or None where it is one for each row of the batch."""
        if self.segment is None:
            return None
        # the past belongs to the document of the first token
        place = torch.arange(first - self.keep, end, device=self.x.device).clamp_min(0)
        documents = self.segment[:, place]
        return documents if bool((documents != documents[:, -1:]).any()) else None

    def masked(self, values_BSC: Tensor, documents: Tensor | None, k: int) -> Tensor:
        """Zero where tap k of the window would come from another document."""
        if documents is None:
            return values_BSC
        size = values_BSC.shape[1]
        other = documents[:, k : k + size] != documents[:, self.keep :]
        return values_BSC.masked_fill(other.unsqueeze(-1), 0)

    def sums(self, window: Tensor, documents: Tensor | None) -> Tensor:
        """bias + the taps, [B, S, C]."""
        size = window.shape[1] - self.keep
        tap, own = self.taps_KC[self.keep], window[:, self.keep :]
        y = own * tap if self.bias is None else torch.addcmul(self.bias, own, tap)
        for k in range(self.keep):
            y.addcmul_(self.masked(window[:, k : k + size], documents, k), self.taps_KC[k])
        return y


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, past, segment, silu):  # type: ignore[no-untyped-def]
        inputs = _Inputs(x, weight, bias, past, segment)
        y_BLC = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for first, end in inputs.blocks():
            y = inputs.sums(inputs.window(first, end), inputs.documents(first, end))
            y_BLC[:, first:end] = F.silu(y) if silu else y
        ctx.save_for_backward(x, weight, bias, past, segment)
        ctx.silu = silu
        return y_BLC

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BLC):  # type: ignore[no-untyped-def]
        x, weight, bias, past, segment = ctx.saved_tensors
        inputs = _Inputs(x, weight, bias, past, segment)
        keep = inputs.keep
        dinputs = x.new_zeros(x.shape[0], keep + x.shape[1], x.shape[2], dtype=inputs.work)
        dtaps_KC = torch.zeros_like(inputs.taps_KC)
        dbias_C = torch.zeros_like(inputs.taps_KC[0])
        for first, end in inputs.blocks():
            window, documents = inputs.window(first, end), inputs.documents(first, end)
            dy = dy_BLC[:, first:end].to(inputs.work)
            if ctx.silu:
                dy = torch.ops.aten.silu_backward(dy, inputs.sums(window, documents))
            dbias_C += dy.sum((0, 1))
            for k in range(keep + 1):
                part = inputs.masked(dy, documents, k)
                dtaps_KC[k] += (part * window[:, k : k + end - first]).sum((0, 1))
                dinputs[:, first + k : end + k].addcmul_(part, inputs.taps_KC[k])
        dpast = None if past is None else dinputs[:, :keep].to(past.dtype)
        dbias = None if bias is None else dbias_C.to(bias.dtype)
        return dinputs[:, keep:].to(x.dtype), dtaps_KC.t().to(weight.dtype), dbias, dpast, None, None
