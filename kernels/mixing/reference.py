"""The mixing losses with both matrices written out, for autograd: O(L^2) memory, obvious.

B batch, L length, H heads, N state width, K key width; matrices are [B, H, L, L], rows are reading tokens t.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .teacher import Teacher


def mixing_reference(
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
    batch, length = log_a_BLH.shape[:2]
    if valid_BL is None:
        valid_BL = torch.ones(batch, length, dtype=torch.bool, device=log_a_BLH.device)
    M_BHLL = student_matrix(C_BLHN, B_BLHN, log_a_BLH, w_BLH, D_H)
    A_BHLL = attention_matrix(teacher, valid_BL)
    rows_B1L1 = valid_BL[:, None, :, None]
    if loss == "frobenius":
        norm_BH: Tensor = torch.linalg.norm((M_BHLL - A_BHLL) * rows_B1L1, dim=(2, 3))
        return norm_BH.mean(0)
    some_BHL = (M_BHLL != 0).any(-1)
    # a row of zeros has no direction: replaced before the division, so that its gradient is 0 and not NaN
    safe_BHLL = torch.where(some_BHL[..., None], M_BHLL, torch.ones_like(M_BHLL))
    A_BHLL = torch.where(rows_B1L1, A_BHLL, torch.ones_like(A_BHLL))
    norms_BHL = torch.linalg.norm(safe_BHLL, dim=-1) * torch.linalg.norm(A_BHLL, dim=-1)
    cosine_BHL = torch.where(some_BHL, (safe_BHLL * A_BHLL).sum(-1) / norms_BHL, 0)
    rows = valid_BL.sum().clamp(min=1)
    return ((1 - cosine_BHL) * valid_BL[:, None]).sum((0, 2)) / rows


def student_matrix(C_BLHN: Tensor, B_BLHN: Tensor, log_a_BLH: Tensor, w_BLH: Tensor, D_H: Tensor) -> Tensor:
    """M[t,s] = (C_t . B_s) exp(sum_{k=s+1..t} log a_k) w_s for s <= t, plus D on the diagonal [Mamba-2, section 3]."""
    length = log_a_BLH.shape[1]
    cum_BHL = log_a_BLH.transpose(1, 2).cumsum(-1)
    later_LL = torch.ones(length, length, dtype=torch.bool, device=log_a_BLH.device).triu(1)
    decay_BHLL = (cum_BHL[..., :, None] - cum_BHL[..., None, :]).masked_fill(later_LL, float("-inf")).exp()
    dots_BHLL = torch.einsum("bthn,bshn->bhts", C_BLHN, B_BLHN)
    skip_HLL = D_H[:, None, None] * torch.eye(length, dtype=D_H.dtype, device=D_H.device)
    return dots_BHLL * decay_BHLL * w_BLH.transpose(1, 2)[..., None, :] + skip_HLL


def attention_matrix(teacher: Teacher, valid_BL: Tensor) -> Tensor:
    """The teacher's attention probabilities; rows of padded tokens are all 0."""
    length = valid_BL.shape[1]
    scores_BHLL = torch.einsum("bthk,bshk->bhts", teacher.q_BLHK, teacher.k_BLHK) * teacher.scale
    if teacher.softcap is not None:
        scores_BHLL = teacher.softcap * torch.tanh(scores_BHLL / teacher.softcap)
    position_L = torch.arange(length, device=valid_BL.device)
    distance_LL = position_L[:, None] - position_L[None, :]
    seen_LL = distance_LL >= 0
    if teacher.window is not None:
        seen_LL = seen_LL & (distance_LL < teacher.window)
    seen_B1LL = (seen_LL & valid_BL[:, None, :] & valid_BL[:, :, None])[:, None]
    scores_BHLL = scores_BHLL.masked_fill(~seen_B1LL, float("-inf"))
    if teacher.sinks_H is None:
        return torch.softmax(scores_BHLL, dim=-1).masked_fill(~seen_B1LL, 0)
    sink_BHL1 = teacher.sinks_H[:, None, None].expand(*scores_BHLL.shape[:3], 1)
    return torch.softmax(torch.cat([scores_BHLL, sink_BHL1], dim=-1), dim=-1)[..., :-1]
