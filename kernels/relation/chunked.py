"""The relation loss in blocks of rows: O(L) memory, with the gradients computed in the forward pass.

With Q and P the student's and the teacher's relations, dKL/dscores = Q - P, and X stands on both sides of the scores:
dX = scale ((Q - P) + (Q - P)^T) X. A block of rows gives a product for its own tokens and one for all that it sees, and
is forgotten. The former is written along rows of [J, L] too, so that there is one sum.

Padded tokens are dropped beforehand: they have no row and no column, and a causal mask only needs the order.

B batch, L length (of the tokens kept), H relation heads, J and K widths of the student's and the teacher's; a block of
R rows sees S columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .problem import Problem, computed_in

ROWS = 128
# the score of what is not seen: no probability is left of it, and the difference of two is 0 and not NaN
NEVER = -1e30


def relation_chunked(student_BLHJ: Tensor, problem: Problem) -> Tensor:
    """The loss per head [H]."""
    apply: Callable[..., Tensor] = _RelationLoss.apply
    return apply(student_BLHJ.to(computed_in(student_BLHJ)), problem, torch.is_grad_enabled())


class _RelationLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, problem, grads):  # type: ignore[no-untyped-def]
        batch, length, heads, width = student.shape
        teacher = problem.teacher_BLHK.to(student.dtype)
        want = grads and ctx.needs_input_grad[0]
        dX_BHJL = student.new_zeros(batch, heads, width, length) if want else None
        loss_H = torch.zeros(heads, dtype=torch.float64, device=student.device)
        for b in range(batch):
            kept = slice(None) if problem.valid_BL is None else problem.valid_BL[b].nonzero().squeeze(1)
            x_HLJ, y_HLK = (t[b, kept].transpose(0, 1).contiguous() for t in (student, teacher))
            blocks = _Blocks(x_HLJ, problem.causal)
            for h in range(heads):
                grad_JL = torch.zeros_like(x_HLJ[h].t()) if want else None
                x, y = _Side(x_HLJ[h], problem.student_scale), _Side(y_HLK[h], problem.teacher_scale)
                loss_H[h] += blocks.run(x, y, grad_JL)
                if dX_BHJL is not None:
                    dX_BHJL[b, h][:, kept] = grad_JL
        ctx.tokens = problem.tokens
        ctx.save_for_backward(dX_BHJL)
        return (loss_H / ctx.tokens).to(student.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_H):  # type: ignore[no-untyped-def]
        (dX_BHJL,) = ctx.saved_tensors
        return (dX_BHJL * (grad_H / ctx.tokens)[:, None, None]).permute(0, 3, 1, 2), None, None


class _Side:
    """The vectors of one head of one model."""

    def __init__(self, x_LJ: Tensor, scale: float) -> None:
        self.x_LJ, self.scaled_JL = x_LJ, (x_LJ * scale).t().contiguous()

    def scores(self, out_RS: Tensor, rows: slice, later_RR: Tensor | None) -> None:
        """The scores of rows against the first S tokens, less the largest of each row."""
        torch.mm(self.x_LJ[rows], self.scaled_JL[:, : out_RS.shape[1]], out=out_RS)
        if later_RR is not None:
            count = out_RS.shape[0]
            out_RS[:, rows].add_(later_RR[:count, :count])
        out_RS.sub_(out_RS.amax(1, keepdim=True))


class _Blocks:
    """What the heads of one sequence share: buffers for a block of rows, and the mask on its diagonal."""

    def __init__(self, x_HLJ: Tensor, causal: bool) -> None:
        self.length = x_HLJ.shape[1]
        rows = min(ROWS, self.length)
        self.buffers = x_HLJ.new_empty(3, rows * self.length)
        self.later_RR = x_HLJ.new_full((rows, rows), NEVER).triu_(1) if causal else None

    def run(self, x: _Side, y: _Side, grad_JL: Tensor | None) -> Tensor:
        """The sum over rows of KL(P || Q); adds its gradient for the student x to `grad_JL`."""
        kl_L = x.x_LJ.new_empty(self.length)
        for start in range(0, self.length, ROWS):
            rows = slice(start, min(start + ROWS, self.length))
            residual_RS = self._residual(x, y, rows, kl_L)
            if grad_JL is not None:
                seen_JS = x.scaled_JL[:, : residual_RS.shape[1]]
                grad_JL[:, : residual_RS.shape[1]].addmm_(x.scaled_JL[:, rows], residual_RS)
                grad_JL[:, rows].addmm_(seen_JS, residual_RS.t())
        return kl_L.double().sum()

    def _residual(self, x: _Side, y: _Side, rows: slice, kl_L: Tensor) -> Tensor:
        """Q - P of a block of rows; writes their divergences."""
        count, stop = rows.stop - rows.start, self.length if self.later_RR is None else rows.stop
        s_RS, t_RS, q_RS = (buffer[: count * stop].view(count, stop) for buffer in self.buffers)
        x.scores(s_RS, rows, self.later_RR)
        y.scores(t_RS, rows, self.later_RR)
        torch.exp(s_RS, out=q_RS)
        difference_RS = torch.sub(t_RS, s_RS, out=s_RS)
        p_RS = t_RS.exp_()
        q_R1, p_R1 = q_RS.sum(1, keepdim=True), p_RS.sum(1, keepdim=True)
        torch.sub(torch.linalg.vecdot(p_RS, difference_RS) / p_R1[:, 0], (p_R1 / q_R1)[:, 0].log(), out=kl_L[rows])
        return q_RS.div_(q_R1).sub_(p_RS.div_(p_R1))
