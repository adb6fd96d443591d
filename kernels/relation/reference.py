"""The relation loss with both matrices written out, for autograd: O(L^2) memory, obvious.

B batch, L length, H relation heads, J and K widths of the student's and the teacher's; matrices are [B, H, L, L].
"""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import Problem, computed_in


def relation_reference(student_BLHJ: Tensor, problem: Problem) -> Tensor:
    """The loss per head [H]."""
    batch, length = student_BLHJ.shape[:2]
    work = computed_in(student_BLHJ)
    valid_BL = problem.valid_BL
    if valid_BL is None:
        valid_BL = torch.ones(batch, length, dtype=torch.bool, device=student_BLHJ.device)
    seen_BLL = valid_BL[:, None, :].expand(batch, length, length)
    if problem.causal:
        seen_BLL = seen_BLL.tril()
    # rows of padded tokens do not count; that they see themselves keeps their softmax finite
    seen_B1LL = (seen_BLL | torch.eye(length, dtype=torch.bool, device=seen_BLL.device))[:, None]
    log_q_BHLL = log_relation(student_BLHJ.to(work), problem.student_scale, seen_B1LL)
    log_p_BHLL = log_relation(problem.teacher_BLHK.to(work), problem.teacher_scale, seen_B1LL)
    kl_BHL = (log_p_BHLL.exp() * (log_p_BHLL - log_q_BHLL)).sum(-1)
    return (kl_BHL * valid_BL[:, None]).sum((0, 2)) / problem.tokens


def log_relation(x_BLHK: Tensor, scale: float, seen_B1LL: Tensor) -> Tensor:
    """log softmax(scale X X^T) over what each row sees, 0 elsewhere."""
    scores_BHLL = torch.einsum("bthk,bshk->bhts", x_BLHK, x_BLHK) * scale
    log_BHLL = torch.log_softmax(scores_BHLL.masked_fill(~seen_B1LL, float("-inf")), dim=-1)
    return log_BHLL.masked_fill(~seen_B1LL, 0)
