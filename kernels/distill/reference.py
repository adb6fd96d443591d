"""The distillation losses with all logits written out, for autograd: [tokens, vocabulary] of both sides, obvious.

T tokens, K kept tokens of the teacher, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .objective import FLOOR, IGNORED, Buckets, Ensemble, Objective, Side


def distill_reference(student: Side, teacher: Side | Ensemble, labels_T: Tensor | None, objective: Objective) -> Tensor:
    """The scalar loss; a missing token count divides by 1."""
    student_TV, teacher_TV = _logits(student), _logits(teacher).detach()
    tau = objective.temperature
    log_q_TV, log_p_TV = F.log_softmax(student_TV / tau, dim=-1), F.log_softmax(teacher_TV / tau, dim=-1)
    return _total(_divergence(log_p_TV, log_q_TV, objective), student_TV, labels_T, objective)


def topk_reference(student: Side, teacher: Buckets, labels_T: Tensor | None, objective: Objective) -> Tensor:
    """The scalar loss over the K known tokens and a bucket for all others."""
    student_TV = _logits(student)
    log_q_TV = F.log_softmax(student_TV / objective.temperature, dim=-1)
    log_q_TK = log_q_TV.gather(1, teacher.indices_TK)
    kl_T = (teacher.log_probs_TK.exp() * (teacher.log_probs_TK - log_q_TK)).sum(-1)
    if log_q_TK.shape[1] < log_q_TV.shape[1]:
        log_rest_T = log_q_TV.scatter(1, teacher.indices_TK, -math.inf).logsumexp(-1)
        kl_T = kl_T + teacher.log_tail_T.exp() * (teacher.log_tail_T - log_rest_T)
    return _total(kl_T, student_TV, labels_T, objective)


def _total(divergence_T: Tensor, student_TV: Tensor, labels_T: Tensor | None, objective: Objective) -> Tensor:
    divergence = objective.temperature**2 * divergence_T.sum() / max(student_TV.shape[0], 1)
    if labels_T is None:
        return divergence
    labelled = (labels_T != IGNORED).sum().clamp(min=1)
    ce = F.cross_entropy(student_TV, labels_T, ignore_index=IGNORED, reduction="sum") / labelled
    return divergence + objective.ce_weight * ce


def _logits(side: Side | Ensemble) -> Tensor:
    if isinstance(side, Ensemble):
        return torch.stack([w * _logits(s) for s, w in zip(side.sides, side.weights, strict=True)]).sum(0)
    side = side.prepared(torch.promote_types(side.dtype, torch.float32))
    logits_TV = F.linear(side.hidden_TD, side.head_VD, side.bias_V)
    return logits_TV if side.softcap is None else side.softcap * torch.tanh(logits_TV / side.softcap)


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
