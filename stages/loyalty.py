"""How a student's next-token distribution keeps to its teacher's, token by token: probability and rank.

T tokens, V vocabulary, K the teacher's likeliest tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

# the teacher's likeliest tokens whose order is compared
TOP = 10


def probability_gap(log_t_TV: Tensor, log_s_TV: Tensor) -> Tensor:
    """|p_t - p_s| of the teacher's likeliest token; [T]."""
    best_T1 = log_t_TV.argmax(-1, keepdim=True)
    return (log_t_TV.gather(-1, best_T1).exp() - log_s_TV.gather(-1, best_T1).exp()).abs().squeeze(-1)


def rank_correlation(log_t_TV: Tensor, log_s_TV: Tensor, top: int = TOP) -> Tensor:
    """Spearman's correlation of how both order the teacher's `top` likeliest tokens; [T], 1 for the same order."""
    count = min(top, log_t_TV.shape[-1])
    best_TK = log_t_TV.topk(count, dim=-1).indices
    own_TK = log_s_TV.gather(-1, best_TK).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    moved_TK = own_TK - torch.arange(count, device=own_TK.device)
    return 1 - 6 * moved_TK.square().sum(-1).double() / (count * (count**2 - 1))
