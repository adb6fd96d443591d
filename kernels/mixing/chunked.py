"""The mixing losses in blocks of rows: O(L) memory, with the gradients computed in the forward pass.

The teacher is frozen and the loss is a scalar per head, so everything the backward needs is the gradient itself, and a
block of rows is forgotten as soon as it is added up. What keeps the arithmetic near its four matrix products:

- Left of the diagonal block the decay is a product exp(cum_t - ref) exp(ref - cum_s) of a row and a column factor,
  taken into C and B, so that only diagonal blocks exponentiate every element. `ref` follows cum once they are SPAN
  apart: the factors then stay in range, and columns that decayed to nothing leave the products.
- d log_a = reverse-cumsum(<C, dC> - <B, dB>) for any loss on M, since raising cum_t scales row t as raising C_t does
  and column t as lowering B_t does.
- Padded tokens are dropped beforehand: they have no row, no column and no decay.

B batch, L length (of the tokens kept), H heads, N state width, K key width; Z blocks of R rows, S columns of a block.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .scores import ROWS, Scores, by_head
from .teacher import Teacher

SPAN = 30.0  # nats between cum and its reference: factors up to e^30, small against either end of float32
DEAD = 80.0  # nats after which a column is left out, just before float32 leaves its normal range


def mixing_chunked(
    C_BLHN: Tensor,
    B_BLHN: Tensor,
    log_a_BLH: Tensor,
    w_BLH: Tensor,
    D_H: Tensor,
    teacher: Teacher,
    valid_BL: Tensor | None,
    loss: str,
) -> Tensor:
    """The loss per head [H]."""
    grads = torch.is_grad_enabled()
    apply: Callable[..., Tensor] = _MixingLoss.apply
    return apply(C_BLHN, B_BLHN, log_a_BLH, w_BLH, D_H, teacher, valid_BL, loss, grads)


class _MixingLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, C, B, log_a, w, D, teacher, valid, loss, grads):  # type: ignore[no-untyped-def]
        batch, length, heads = log_a.shape
        want = grads and any(ctx.needs_input_grad[:5])
        outs = [t.new_zeros(t.transpose(1, 2).shape) for t in (C, B, log_a, w)] if want else []
        dD_H, loss_H = torch.zeros_like(D), torch.zeros(heads, dtype=torch.float64, device=D.device)
        # the loss is a mean: over rows for the cosine, over matrices for the norm
        count = batch if loss == "frobenius" else batch * length if valid is None else int(valid.sum())
        for b in range(batch):
            kept = None if valid is None else valid[b].nonzero().squeeze(1)
            if length == 0 or (kept is not None and kept.numel() == 0):
                continue
            C_HLN, B_HLN, log_a_HL, w_HL = (by_head(t[b], kept) for t in (C, B, log_a, w))
            scores = Scores(teacher, b, kept, length)
            for h in range(heads):
                head = _Head(C_HLN[h], B_HLN[h], log_a_HL[h], w_HL[h], D[h], want)
                loss_H[h] += head.frobenius(scores, h) if loss == "frobenius" else head.cosine(scores, h)
                if want:
                    dD_H[h] += head.dD
                    for out, grad in zip(outs, head.gradients(), strict=True):
                        out[b, h, slice(None) if kept is None else kept] = grad
        ctx.count = max(count, 1)
        ctx.save_for_backward(*outs, dD_H)
        return (loss_H / ctx.count).to(C.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_H):  # type: ignore[no-untyped-def]
        *outs, dD_H = ctx.saved_tensors
        share_H11 = (grad_H / ctx.count)[:, None, None]
        grads = ((t * (share_H11 if t.ndim == 4 else share_H11[..., 0])).transpose(1, 2) for t in outs)
        return *grads, dD_H * share_H11[:, 0, 0], None, None, None, None


@dataclass(frozen=True)
class _Segment:
    """Successive blocks of rows that share a reference; `alive` is the first column that still counts."""

    ref: float
    alive: int
    starts: list[int]


def _segments(cum: list[float]) -> Iterator[_Segment]:
    segment = _Segment(cum[0], 0, [0])
    for start in range(ROWS, len(cum), ROWS):
        ref = cum[start - 1]
        if segment.ref - ref <= SPAN:
            segment.starts.append(start)
            continue
        yield segment
        segment = _Segment(ref, bisect.bisect_right(cum, -ref - DEAD, hi=start, key=lambda value: -value), [start])
    yield segment


class _Head:
    """The student's matrix of one head: residuals of a block of rows against the teacher, and the gradients they give.

    Diagonal blocks are built before and differentiated after the loop, all at once; in `dM_ZRR` they wait as residuals
    A - M. Left of them products run on [N, L] layouts, where adding up dB writes along rows.
    """

    def __init__(self, C_LN: Tensor, B_LN: Tensor, log_a_L: Tensor, w_L: Tensor, D: Tensor, want: bool) -> None:
        self.C_LN, self.B_LN, self.w_L, self.want = C_LN, B_LN, w_L, want
        wB_LN = B_LN * w_L[:, None]
        self.wB_NL = wB_LN.t().contiguous()
        self.length = C_LN.shape[0]
        self.cum_L = log_a_L.double().cumsum(0)
        self.segments = list(_segments(self.cum_L.tolist()))
        refs = torch.tensor([s.ref for s in self.segments for _ in s.starts], dtype=torch.float64, device=w_L.device)
        self.row_L = (self.cum_L - refs.repeat_interleave(ROWS)[: self.length]).exp().to(w_L.dtype)
        self.rowC_LN = C_LN * self.row_L[:, None]
        self.C_ZRN, self.wB_ZRN = _blocks(C_LN), _blocks(wB_LN)
        cum_ZR = _blocks(self.cum_L)
        # above the diagonal the difference would be positive and overflow
        self.decay_ZRR = (cum_ZR[:, :, None] - cum_ZR[:, None, :]).clamp_(max=0).to(w_L.dtype).exp_().tril_()
        self.M_ZRR = torch.bmm(self.C_ZRN, self.wB_ZRN.transpose(1, 2)).mul_(self.decay_ZRR)
        self.M_ZRR.diagonal(dim1=1, dim2=2).add_(D)
        self.buffers = C_LN.new_empty(2, min(ROWS, self.length) * self.length)
        self.wBc_NL = torch.empty_like(self.wB_NL)
        if want:
            self.dM_ZRR = torch.zeros_like(self.M_ZRR)
            self.dC_LN = torch.empty_like(C_LN)
            self.dB_NL, self.dBc_NL = torch.zeros_like(self.wB_NL), torch.zeros_like(self.wB_NL)

    def frobenius(self, scores: Scores, h: int) -> Tensor:
        """The norm of M - A, with the gradients divided by it, which is known only once all rows are done."""
        norm_L = torch.empty_like(self.w_L)
        for start, alive in self._blocks_of_rows():
            A_RS, here, low = self._open(start, alive, scores)
            scores.fill(A_RS, h, start, low)
            past_RS, here_RR = A_RS[:, alive - low : start - low], A_RS[:, start - low :]
            rows = slice(start, start + A_RS.shape[0])
            past_RS.addmm_(self.rowC_LN[rows], self.wBc_NL[:, alive:start], alpha=-1)
            here_RR.sub_(here)
            torch.linalg.vector_norm(A_RS, dim=1, out=norm_L[rows])
            if self.want:
                self._add_gradients(past_RS, here_RR, start, alive, self.rowC_LN[rows])
        norm: Tensor = torch.linalg.vector_norm(norm_L.double())
        if self.want:
            self._finish(torch.where(norm > 0, -1 / norm, 0).to(norm_L.dtype))
        return norm

    def cosine(self, scores: Scores, h: int) -> Tensor:
        """The sum over rows of 1 - cos(M_t, A_t)."""
        cosine_L, factor_L = torch.empty_like(self.w_L), torch.empty_like(self.w_L)
        for start, alive in self._blocks_of_rows():
            A_RS, here, low = self._open(start, alive, scores)
            # a sink only scales rows, to which the cosine is blind
            scores.fill(A_RS, h, start, low, sink=False)
            rows, left = slice(start, start + A_RS.shape[0]), start - low
            M_RS = self._view(1, A_RS.shape)
            M_RS[:, : alive - low].zero_()
            torch.mm(self.rowC_LN[rows], self.wBc_NL[:, alive:start], out=M_RS[:, alive - low : left])
            M_RS[:, left:].copy_(here)
            m_R, a_R = (torch.linalg.vector_norm(t, dim=1) for t in (M_RS, A_RS))
            m_R.masked_fill_(m_R == 0, math.inf)  # a row of zeros: cosine 0, gradient 0
            along_R = torch.linalg.vecdot(M_RS, A_RS).div_(m_R)
            torch.div(along_R, a_R, out=cosine_L[rows])
            if self.want:
                # -dL/dM of row t is (A - M <M,A>/<M,M>) / (|M| |A|)
                torch.reciprocal(m_R.mul(a_R), out=factor_L[rows]).neg_()
                A_RS.sub_(M_RS.mul_(along_R.div_(m_R)[:, None]))
                row_RN = self.rowC_LN[rows] * factor_L[rows, None]
                self._add_gradients(A_RS[:, alive - low : left], A_RS[:, left:], start, alive, row_RN)
        if self.want:
            self._finish(factor_L, shared=False)
        return (1 - cosine_L.double()).sum()

    def gradients(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients for C, B, log_a and w of this head, [L, N] or [L]."""
        dwB_LN = self.dB_NL.t()
        dw_L = (self.B_LN * dwB_LN).sum(1)
        shift_L = (self.C_LN * self.dC_LN).sum(1).double() - dw_L.double() * self.w_L
        dlog_a_L = shift_L.flip(0).cumsum(0).flip(0)
        dlog_a_L[0] = 0  # nothing comes before the first token; the sum leaves rounding there
        return self.dC_LN, dwB_LN * self.w_L[:, None], dlog_a_L.to(dw_L.dtype), dw_L

    def _view(self, which: int, shape: torch.Size | tuple[int, int]) -> Tensor:
        return self.buffers[which, : shape[0] * shape[1]].view(shape[0], shape[1])

    def _blocks_of_rows(self) -> Iterator[tuple[int, int]]:
        """First row and first column of every block; between segments rescales the columns and takes up their sums."""
        for segment in self.segments:
            columns = slice(segment.alive, segment.starts[-1])
            column_L = (segment.ref - self.cum_L[columns]).exp().to(self.w_L.dtype)
            torch.mul(self.wB_NL[:, columns], column_L, out=self.wBc_NL[:, columns])
            for start in segment.starts:
                yield start, segment.alive
            if self.want:
                self.dB_NL[:, columns].addcmul_(self.dBc_NL[:, columns], column_L)
                self.dBc_NL[:, columns].zero_()

    def _open(self, start: int, alive: int, scores: Scores) -> tuple[Tensor, Tensor, int]:
        """A buffer for a block of rows, the student's diagonal block, and the buffer's first column."""
        rows, low = min(ROWS, self.length - start), min(alive, scores.first(start))
        return self._view(0, (rows, start + rows - low)), self.M_ZRR[start // ROWS, :rows, :rows], low

    def _add_gradients(self, past_RS: Tensor, here_RR: Tensor, start: int, alive: int, row_RN: Tensor) -> None:
        """Takes up a block of A - M; the row factors of dC and of the diagonal block come in `_finish`."""
        rows = here_RR.shape[0]
        self.dM_ZRR[start // ROWS, :rows, :rows] = here_RR
        torch.mm(past_RS, self.wBc_NL[:, alive:start].t(), out=self.dC_LN[start : start + rows])
        self.dBc_NL[:, alive:start].addmm_(row_RN.t(), past_RS)

    def _finish(self, factor: Tensor, shared: bool = True) -> None:
        """Differentiates the diagonal blocks, with dL/dM = factor (A - M); left of them dB holds a factor per row."""
        if shared:
            self.dB_NL.mul_(factor)
            self.dM_ZRR.mul_(factor)
        else:
            self.dM_ZRR.mul_(_blocks(factor)[:, :, None])
        self.dD = self.dM_ZRR.diagonal(dim1=1, dim2=2).sum()
        self.dM_ZRR.mul_(self.decay_ZRR)
        self.dC_LN.mul_((self.row_L * factor)[:, None])
        self.dC_LN.add_(torch.bmm(self.dM_ZRR, self.wB_ZRN).flatten(0, 1)[: self.length])
        self.dB_NL.add_(torch.bmm(self.dM_ZRR.transpose(1, 2), self.C_ZRN).flatten(0, 1)[: self.length].t())


def _blocks(t_Lx: Tensor) -> Tensor:
    """[L, ...] to [Z, R, ...], padded with zeros."""
    pad = -t_Lx.shape[0] % ROWS
    return F.pad(t_Lx, (0, 0) * (t_Lx.ndim - 1) + (0, pad)).reshape(-1, ROWS, *t_Lx.shape[1:])
