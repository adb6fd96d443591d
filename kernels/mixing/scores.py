"""The teacher's attention matrix, a block of rows of one head at a time.

L length (of the tokens kept), H heads, K key width; R rows of a block, S columns of it.
"""

from __future__ import annotations

import bisect
import math

import torch
from torch import Tensor

from .teacher import Teacher

ROWS = 128


def by_head(t_LHx: Tensor, kept: Tensor | None) -> Tensor:
    """The tokens kept, contiguous for each head [H, L, ...]."""
    return (t_LHx if kept is None else t_LHx[kept]).transpose(0, 1).contiguous()


class Scores:
    """The teacher's attention of one sequence, a block of rows of one head at a time."""

    def __init__(self, teacher: Teacher, b: int, kept: Tensor | None, length: int) -> None:
        self.q_HLK = by_head(teacher.q_BLHK[b] * teacher.scale, kept)
        k_LHK = teacher.k_BLHK[b] if kept is None else teacher.k_BLHK[b, kept]
        self.k_HKL = k_LHK.permute(1, 2, 0).contiguous()
        self.teacher = teacher
        self.position_L = torch.arange(length, device=self.q_HLK.device) if kept is None else kept
        self.positions = self.position_L.tolist()
        self.later_RR = self.q_HLK.new_full((ROWS, ROWS), -math.inf).triu_(1)

    def first(self, row: int) -> int:
        """The first token that the given row sees."""
        window = self.teacher.window
        return 0 if window is None else bisect.bisect_right(self.positions, self.positions[row] - window)

    def fill(self, A_RS: Tensor, h: int, start: int, low: int, sink: bool = True) -> None:
        """Writes the probabilities of rows start.. into A, whose columns are the tokens from low to the last row."""
        rows, stop, first = A_RS.shape[0], start + A_RS.shape[0], self.first(start)
        if first > low:
            A_RS[:, : first - low].zero_()
        seen_RS = A_RS[:, first - low :]
        torch.mm(self.q_HLK[h, start:stop], self.k_HKL[h, :, first:stop], out=seen_RS)
        if self.teacher.softcap is not None:
            seen_RS.div_(self.teacher.softcap).tanh_().mul_(self.teacher.softcap)
        seen_RS[:, start - first :].add_(self.later_RR[:rows, :rows])
        if self.teacher.window is not None:
            last = self.first(stop - 1)
            far_RS = self.position_L[start:stop, None] - self.position_L[first:last] >= self.teacher.window
            seen_RS[:, : last - first].masked_fill_(far_RS, -math.inf)
        if self.teacher.sinks_H is None or not sink:
            torch.softmax(seen_RS, dim=-1, out=seen_RS)
        else:
            log_sum_R1 = torch.logaddexp(seen_RS.logsumexp(-1, keepdim=True), self.teacher.sinks_H[h])
            seen_RS.sub_(log_sum_R1).exp_()
