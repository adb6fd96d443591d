"""The distillation losses with all logits written out, for autograd: [tokens, vocabulary] of both sides, obvious.

T tokens, V vocabulary, D and E widths of student and teacher.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .objective import FLOOR, IGNORED, Objective


def distill_reference(
    student_TD: Tensor,
    student_head_VD: Tensor,
    student_bias_V: Tensor | None,
    teacher_TE: Tensor,
    teacher_head_VE: Tensor,
    teacher_bias_V: Tensor | None,
    labels_T: Tensor | None,
    objective: Objective,
) -> Tensor:
    """The scalar loss; a missing token count divides by 1."""
    tau = objective.temperature
    student_TV = _logits(student_TD, student_head_VD, student_bias_V, objective.student_softcap)
    teacher_TV = _logits(teacher_TE, teacher_head_VE, teacher_bias_V, objective.teacher_softcap).detach()
    log_q_TV, log_p_TV = F.log_softmax(student_TV / tau, dim=-1), F.log_softmax(teacher_TV / tau, dim=-1)
    divergence = tau**2 * _divergence(log_p_TV, log_q_TV, objective).sum() / max(student_TD.shape[0], 1)
    if labels_T is None:
        return divergence
    labelled = (labels_T != IGNORED).sum().clamp(min=1)
    ce = F.cross_entropy(student_TV, labels_T, ignore_index=IGNORED, reduction="sum") / labelled
    return divergence + objective.ce_weight * ce


def _logits(hidden_TD: Tensor, head_VD: Tensor, bias_V: Tensor | None, softcap: float | None) -> Tensor:
    logits_TV = F.linear(hidden_TD, head_VD, bias_V)
    return logits_TV if softcap is None else softcap * torch.tanh(logits_TV / softcap)


def _divergence(log_p_TV: Tensor, log_q_TV: Tensor, objective: Objective) -> Tensor:
    if objective.loss == "kl":
        return _kl(log_p_TV, log_q_TV)
    if objective.loss == "reverse_kl":
        return _kl(log_q_TV, log_p_TV.clamp(min=FLOOR))
    beta = objective.beta
    log_m_TV = torch.logaddexp(log_p_TV + math.log(beta), log_q_TV + math.log1p(-beta))
    return beta * _kl(log_p_TV, log_m_TV) + (1 - beta) * _kl(log_q_TV, log_m_TV)


def _kl(log_p_TV: Tensor, log_q_TV: Tensor) -> Tensor:
    """KL(p || q) of every token."""
    return (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1)
