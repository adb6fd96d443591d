"""Small pictures of large matrices: what `mixing_loss` compares, averaged over cells, without holding an L x L matrix.

Rows of a block are added up by cell into [R, L], and columns of that once all rows are done.

B batch, L length (of the tokens kept), H heads (h of them asked for), N state width, K key width, R cells; a block of Q
rows has S columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssmorph.errors import fail

from .checks import check_extras, check_shapes, check_teacher
from .scores import ROWS, Scores, by_head
from .teacher import Teacher


@torch.no_grad()
def mixing_maps(
    C_BLHN: Tensor,
    B_BLHN: Tensor,
    log_a_BLH: Tensor,
    q_BLHK: Tensor,
    k_BLGK: Tensor,
    *,
    heads: Sequence[int] | None = None,
    resolution: int = 64,
    w_BLH: Tensor | None = None,
    D_H: Tensor | None = None,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    valid_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The student's M and the teacher's A, as `mixing_loss` has them, as maps of R x R cells for plots.

    Token p of L lies in cell floor(p R / L), so that cells differ by one token at most where R does not divide L, and R
    is `resolution`, or L where that is less. Cell (i, j) is the mean of M[t,s] over the batch and over the pairs
    s <= t with t in cell i and s in cell j: diagonal cells are means over their lower half, and the upper half, which
    is 0 for any causal matrix, does not thin them out. Pairs with a padded token do not count. A cell without a pair,
    as all above the diagonal, is NaN and not 0: 0 is what a window leaves. In O(L R) memory, on any device, without
    gradients; computed in float32 (float64 for float64).

    Args:
        heads: the heads to read, in the order of the maps; None for all.
        resolution: cells along a side, at least 1.

    The other arguments are those of `mixing_loss`.

    Returns:
        Two tensors [h, R, R] in float32 (float64 for float64), the student's first; rows are reading tokens.

    Raises:
        ValueError: as `mixing_loss`, and a resolution below 1 or a head that is not there.
    """
    op = "mixing_maps"
    check_teacher(op, window, softcap)
    check_shapes(op, C_BLHN, B_BLHN, log_a_BLH, q_BLHK, k_BLGK)
    check_extras(op, log_a_BLH, w_BLH, D_H, sinks_H, valid_BL)
    length, count = log_a_BLH.shape[1:]
    chosen = list(range(count) if heads is None else heads)
    _check_maps(op, chosen, count, resolution)
    work = torch.promote_types(C_BLHN.dtype, torch.float32)
    C, B, q, k = (_of_heads(t, chosen, count).to(work) for t in (C_BLHN, B_BLHN, q_BLHK, k_BLGK))
    log_a = log_a_BLH[:, :, chosen].double()
    w = C.new_ones(log_a.shape) if w_BLH is None else w_BLH[:, :, chosen].to(work)
    D = C.new_zeros(len(chosen)) if D_H is None else D_H[chosen].to(work)
    teacher = Teacher(q, k, scale, window, softcap, None if sinks_H is None else sinks_H[chosen].to(work))
    with torch.autocast(C.device.type, enabled=False):
        maps = _Maps(len(chosen), min(resolution, length), length, C.new_empty(0))
        for b in range(C.shape[0]):
            kept = None if valid_BL is None else valid_BL[b].nonzero().squeeze(1)
            if length and (kept is None or kept.numel()):
                C_HLN, B_HLN, log_a_HL, w_HL = (by_head(t[b], kept) for t in (C, B, log_a, w))
                maps.add(_Student(C_HLN, B_HLN, log_a_HL, w_HL, D), Scores(teacher, b, kept, length))
        return maps.means()


def _check_maps(op: str, heads: list[int], count: int, resolution: int) -> None:
    if resolution < 1:
        raise fail(f"{op}.resolution", "must be at least 1 cell", resolution, "Use 64.")
    for h in heads:
        if not 0 <= h < count:
            raise fail(f"{op}.heads", f"a head must be in 0..{count - 1}", h, "Name heads of log_a_BLH.")


def _of_heads(t_BLGN: Tensor, heads: list[int], count: int) -> Tensor:
    """Of each head asked for, what its group holds."""
    repeat = count // t_BLGN.shape[2]
    return t_BLGN[:, :, [h // repeat for h in heads]]


class _Student:
    """The student's matrices of one sequence, a block of rows of one head at a time."""

    def __init__(self, C_HLN: Tensor, B_HLN: Tensor, log_a_HL: Tensor, w_HL: Tensor, D_H: Tensor) -> None:
        self.C_HLN, self.wB_HLN, self.D_H = C_HLN, B_HLN * w_HL[..., None], D_H
        self.cum_HL = log_a_HL.cumsum(-1)

    def fill(self, M_QS: Tensor, h: int, start: int) -> None:
        """Writes rows start.. up to the column of the last."""
        stop = start + M_QS.shape[0]
        torch.mm(self.C_HLN[h, start:stop], self.wB_HLN[h, :stop].t(), out=M_QS)
        # above the diagonal the decay may be infinite, and is overwritten
        decay_QS = (self.cum_HL[h, start:stop, None] - self.cum_HL[h, :stop]).exp_()
        M_QS.mul_(decay_QS).tril_(start)
        M_QS.diagonal(start).add_(self.D_H[h])


class _Maps:
    """Sums over the pairs of each cell, and how many there are."""

    def __init__(self, heads: int, cells: int, length: int, like: Tensor) -> None:
        self.sums = like.new_zeros(2, heads, cells, cells)
        self.pairs_RR = like.new_zeros(cells, cells, dtype=torch.float64)
        self.cells, self.length = cells, length

    def add(self, student: _Student, scores: Scores) -> None:
        """Takes up one sequence."""
        cell_L = scores.position_L * self.cells // self.length
        member_RL = cell_L == torch.arange(self.cells, device=cell_L.device)[:, None]
        self.pairs_RR += member_RL.double() @ member_RL.double().cumsum(1).t()
        pool_RL, cells = member_RL.to(self.sums.dtype), cell_L.tolist()
        buffer = pool_RL.new_empty(min(ROWS, len(cells)) * len(cells))
        for h in range(self.sums.shape[1]):
            rows_RL = pool_RL.new_zeros(2, *pool_RL.shape)
            for start in range(0, len(cells), ROWS):
                stop = min(start + ROWS, len(cells))
                matrix_QS = buffer[: (stop - start) * stop].view(stop - start, stop)
                # the only cells that these rows lie in
                band = slice(cells[start], cells[stop - 1] + 1)
                student.fill(matrix_QS, h, start)
                rows_RL[0, band, :stop].addmm_(pool_RL[band, start:stop], matrix_QS)
                scores.fill(matrix_QS, h, start, 0)
                rows_RL[1, band, :stop].addmm_(pool_RL[band, start:stop], matrix_QS)
            self.sums[:, h] += rows_RL @ pool_RL.t()

    def means(self) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's maps; 0 / 0 is NaN, as is meant."""
        student_hRR, teacher_hRR = self.sums / self.pairs_RR.to(self.sums.dtype)
        return student_hRR, teacher_hRR
