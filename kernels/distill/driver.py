"""The gradients of a loss over heads, chunk after chunk of tokens, computed in the forward pass.

The teacher is frozen and the loss is a scalar, so the gradient of a chunk's logits is known as soon as they are, and
goes through the head at once: the logits of one chunk are all that is ever held of them.

T tokens, C tokens of a chunk, V vocabulary, D width of the student.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Chunks(Protocol):
    """Computes chunk after chunk; its buffers serve them all."""

    rows: int

    def step(self, hidden_CD: Tensor, rows: slice, losses_C: Tensor, grads: bool) -> Tensor:
        """Writes the losses of some tokens; returns the gradients of their sum for h W^T + b, in a buffer."""
        ...


def through_head(hidden_TD: Tensor, head_VD: Tensor, bias_V: Tensor | None, chunks: Chunks) -> Tensor:
    """The mean over tokens; differentiable for the three tensors, 0 for no tokens. A frozen head costs no gradient."""
    apply: Callable[..., Tensor] = _HeadLoss.apply
    return apply(hidden_TD, head_VD, bias_V, chunks, torch.is_grad_enabled())


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, bias, chunks, grads):  # type: ignore[no-untyped-def]
        want = [grads and needed for needed in ctx.needs_input_grad[:3]]
        tokens, exact = hidden.shape[0], torch.promote_types(hidden.dtype, torch.float32)
        dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if want[0] else None
        dhead, dbias = (
            torch.zeros(t.shape, dtype=exact, device=t.device) if needed else None
            for t, needed in zip((head, bias), want[1:], strict=True)
        )
        losses = torch.empty(tokens, dtype=exact, device=hidden.device)
        for start in range(0, tokens, chunks.rows):
            rows = slice(start, start + chunks.rows)
            hidden_CD = hidden[rows]
            grad_CV = chunks.step(hidden_CD, rows, losses[rows], any(want))
            if dhidden is not None:
                torch.mm(grad_CV, head, out=dhidden[rows])
            if dhead is not None:
                _accumulate(dhead, grad_CV.t(), hidden_CD)
            if dbias is not None:
                dbias += grad_CV.sum(0, dtype=exact)
        ctx.save_for_backward(dhidden, dhead, dbias)
        ctx.share, ctx.dtypes = 1 / max(tokens, 1), [None if t is None else t.dtype for t in (hidden, head, bias)]
        return (losses.sum(dtype=torch.float64) * ctx.share).to(exact)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        factor = grad * ctx.share
        saved = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if t is None else (t * factor).to(dtype) for t, dtype in saved), None, None


def _accumulate(sum_VD: Tensor, grad_VC: Tensor, hidden_CD: Tensor) -> None:
    """sum += grad @ hidden, in the dtype of the sum where the factors are narrower."""
    if sum_VD.dtype == hidden_CD.dtype:
        sum_VD.addmm_(grad_VC, hidden_CD)
    elif sum_VD.is_cuda:
        torch.addmm(sum_VD, grad_VC, hidden_CD, out_dtype=sum_VD.dtype, out=sum_VD)
    else:
        sum_VD.addmm_(grad_VC.to(sum_VD.dtype), hidden_CD.to(sum_VD.dtype))
