"""Distillation losses between two language-model heads, from hidden states, without holding [tokens, vocabulary]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ssmorph.errors import fail

from ..common.dispatch import Backends
from ..common.gpu import refuses_triton
from .checks import (
    check_biases,
    check_divergence,
    check_ensemble,
    check_known,
    check_labels,
    check_mask,
    check_numbers,
    check_rest,
    check_side,
    check_teacher,
)
from .chunked import topk_of_chunked
from .liger import refuses_liger
from .objective import DIVERGENCES, Buckets, Ensemble, Objective, Side


def _backends(op_name: str, prefix: str, *names: str) -> Backends:
    targets = {name: f"ssmorph.kernels.distill.{name}:{prefix}_{name}" for name in names}
    return Backends(op_name, targets, refuses={"triton": refuses_triton, "liger": refuses_liger}, on_gpu="triton")


BACKENDS = _backends("distill_loss", "distill", "chunked", "reference", "triton", "liger")
TOPK_BACKENDS = _backends("distill_topk_loss", "topk", "chunked", "reference", "triton")
ENSEMBLE_BACKENDS = _backends("distill_ensemble_loss", "distill", "chunked", "reference", "triton")

__all__ = [
    "BACKENDS",
    "DIVERGENCES",
    "ENSEMBLE_BACKENDS",
    "TOPK_BACKENDS",
    "Side",
    "distill_ensemble_loss",
    "distill_loss",
    "distill_topk_loss",
    "topk_of",
]


def distill_loss(
    student_TD: Tensor,
    student_head_VD: Tensor,
    teacher_TE: Tensor,
    teacher_head_VE: Tensor,
    *,
    loss: str = "kl",
    temperature: float = 1.0,
    beta: float = 0.5,
    labels_T: Tensor | None = None,
    ce_weight: float = 0.0,
    mask_T: Tensor | None = None,
    student_bias_V: Tensor | None = None,
    teacher_bias_V: Tensor | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    chunk: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Mean over tokens of tau^2 d(p, q), p = softmax(teacher / tau), q = softmax(student / tau), plus ce_weight * CE.

    d is KL(p || q) for 'kl', KL(q || p) for 'reverse_kl', and beta KL(p || m) + (1 - beta) KL(q || m) with
    m = beta p + (1 - beta) q for 'jsd' [GKD, eq. 1]. Logits are cap * tanh(scale * (hidden @ head^T + bias) / cap).
    Gradients go to the student's hidden states, head and bias, as far as they require any; the teacher's side gets
    none. A frozen student head costs no head gradient. Computed in float32 (float64 for float64), also under autocast.
    The backend 'triton' multiplies matrices, and rounds gradients of logits before that, in the inputs' dtype. The
    backend 'liger' (the package liger-kernel) runs when asked for, and takes plain heads without cross-entropy alone.

    The teacher's log-probabilities are floored at -100 in 'reverse_kl', where a logit of -inf would cost infinitely
    much. Biases may be -inf.

    Args:
        student_TD, student_head_VD: final hidden states (T tokens) and the rows of the student's head.
        teacher_TE, teacher_head_VE: the same of the teacher, which may have another width E.
        loss: 'kl', 'reverse_kl' or 'jsd'.
        temperature: tau, for both sides; the cross-entropy is at 1.
        beta: weight of the teacher in the mixture of 'jsd', strictly between 0 and 1.
        labels_T: next tokens, already shifted; -100 counts in the divergence, but not in the cross-entropy.
        ce_weight: weight of the cross-entropy, a mean over the unmasked tokens that have a label; 0 ignores the labels.
        mask_T: False at tokens that do not count; all masked gives 0.
        student_bias_V, teacher_bias_V: biases of the heads.
        student_scale, teacher_scale: factors of the logits.
        student_softcap, teacher_softcap: soft caps of the logits; None for none.
        chunk: tokens whose logits are held at once; None for as many as fit a budget of bytes (48 MiB on a CPU).
        backend: a name of `BACKENDS`; left out, SSMORPH_BACKEND or the best for the device.

    Returns:
        A scalar in float32 (float64 for float64).

    Raises:
        ValueError: an unknown loss or backend, shapes or vocabularies that disagree, a ce_weight without labels, a
            label or number out of its range, float64 for 'triton', or what 'liger' cannot do.
    """
    op = "distill_loss"
    check_divergence(op, loss, beta)
    check_numbers(op, temperature, chunk, student_softcap=student_softcap, teacher_softcap=teacher_softcap)
    check_side(op, "student", student_TD, student_head_VD)
    check_side(op, "teacher", teacher_TE, teacher_head_VE)
    check_teacher(op, student_TD, student_head_VD, teacher_TE, teacher_head_VE)
    check_biases(op, student_head_VD.shape[0], student_bias_V=student_bias_V, teacher_bias_V=teacher_bias_V)
    check_mask(op, student_TD.shape[0], mask_T)
    check_labels(op, student_TD.shape[0], student_head_VD.shape[0], labels_T, ce_weight)
    function = BACKENDS.load(backend, student_TD.device)
    student_TD, teacher_TE = _counted(mask_T, student_TD, teacher_TE)
    labels = _counted(mask_T, labels_T)[0] if labels_T is not None and ce_weight else None
    student = Side(student_TD, student_head_VD, student_bias_V, student_scale, student_softcap)
    teacher = Side(teacher_TE, teacher_head_VE, teacher_bias_V, teacher_scale, teacher_softcap)
    objective = Objective(loss, temperature, beta, ce_weight, chunk)
    with torch.autocast(student_TD.device.type, enabled=False):
        result: Tensor = function(student, teacher, labels, objective)
    return result


def distill_ensemble_loss(
    student: Side,
    teachers: Sequence[Side],
    weights: Sequence[float],
    *,
    loss: str = "kl",
    temperature: float = 1.0,
    beta: float = 0.5,
    labels_T: Tensor | None = None,
    ce_weight: float = 0.0,
    mask_T: Tensor | None = None,
    chunk: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """`distill_loss` towards several teachers: their logits' weighted mean, each with its own scale, bias and soft cap.

    That is the normalised geometric mean of their distributions: a token that one teacher holds to be impossible is
    impossible. The logits of one teacher at a time are held, of one chunk.

    Args:
        student, teachers: final hidden states [T, D], heads [V, D] and the rest of each model's end; widths may differ.
        weights: of the teachers, positive; divided by their sum.
        loss, temperature, beta, labels_T, ce_weight, mask_T, chunk: as in `distill_loss`.
        backend: a name of `ENSEMBLE_BACKENDS`; left out, SSMORPH_BACKEND or the best for the device.

    Returns:
        A scalar in float32 (float64 for float64).

    Raises:
        ValueError: as `distill_loss`, no teacher, or weights that are not positive or not as many as teachers.
    """
    op = "distill_ensemble_loss"
    tokens, vocabulary = student.hidden_TD.shape[0], student.head_VD.shape[0]
    check_divergence(op, loss, beta)
    check_numbers(op, temperature, chunk, student_softcap=student.softcap)
    check_side(op, "student", student.hidden_TD, student.head_VD)
    check_biases(op, vocabulary, student_bias_V=student.bias_V)
    check_ensemble(op, teachers, weights)
    for teacher in teachers:
        check_teacher(op, student.hidden_TD, student.head_VD, teacher.hidden_TD, teacher.head_VD)
    check_mask(op, tokens, mask_T)
    check_labels(op, tokens, vocabulary, labels_T, ce_weight)
    function = ENSEMBLE_BACKENDS.load(backend, student.hidden_TD.device)
    labels = _counted(mask_T, labels_T)[0] if labels_T is not None and ce_weight else None
    student, *sides = (replace(s, hidden_TD=_counted(mask_T, s.hidden_TD)[0]) for s in (student, *teachers))
    objective = Objective(loss, temperature, beta, ce_weight, chunk)
    with torch.autocast(student.hidden_TD.device.type, enabled=False):
        result: Tensor = function(student, Ensemble.of(sides, weights), labels, objective)
    return result


@torch.no_grad()
def topk_of(
    teachers: Sequence[Side],
    weights: Sequence[float],
    count: int,
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `distill_topk_loss` takes of teachers: the `count` likeliest tokens of their logits' weighted mean.

    Args:
        teachers, weights: as in `distill_ensemble_loss`.
        count: K, at most the vocabulary.
        temperature: tau; the log-probabilities are those of softmax(logits / tau).
        chunk: tokens whose logits are held at once.

    Returns:
        (indices [T, K] int64, likeliest first; their log-probabilities [T, K]; that of all others together [T], -inf
        where none is left). Float32 (float64 for float64).

    Raises:
        ValueError: a count or temperature out of its range, or sides that disagree.
    """
    op = "topk_of"
    check_numbers(op, temperature, chunk)
    check_ensemble(op, teachers, weights)
    vocabulary = teachers[0].head_VD.shape[0]
    if not 1 <= count <= vocabulary:
        raise fail(f"{op}.count", f"must lie in 1..{vocabulary}, the vocabulary", count, "Keep fewer tokens.")
    for teacher in teachers[1:]:
        check_teacher(op, teachers[0].hidden_TD, teachers[0].head_VD, teacher.hidden_TD, teacher.head_VD)
    objective = Objective("kl", temperature, 0.5, 0.0, chunk)
    with torch.autocast(teachers[0].hidden_TD.device.type, enabled=False):
        return topk_of_chunked(Ensemble.of(teachers, weights), count, objective)


def distill_topk_loss(
    student_TD: Tensor,
    student_head_VD: Tensor,
    indices_TK: Tensor,
    log_probs_TK: Tensor,
    *,
    log_rest_T: Tensor | None = None,
    temperature: float = 1.0,
    labels_T: Tensor | None = None,
    ce_weight: float = 0.0,
    mask_T: Tensor | None = None,
    student_bias_V: Tensor | None = None,
    student_scale: float = 1.0,
    student_softcap: float | None = None,
    chunk: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Mean over tokens of tau^2 KL(p || q) over K + 1 buckets, for a teacher of which K log-probabilities were kept.

    The buckets are the K kept tokens and all others together: their probability is 1 minus the sum of those kept, and
    the student's sum over them. With K = V this is `distill_loss` with 'kl'; with fewer it is at most that, the part
    about which the teacher is known. Differentiable as `distill_loss`, computed in the same dtypes.

    Args:
        student_TD, student_head_VD: as in `distill_loss`, and so are labels, mask, bias, scale, soft cap and chunk.
        indices_TK: the kept tokens, different within a row, in any order.
        log_probs_TK: their log-probabilities under the teacher at the temperature; a token of -inf is impossible.
            A row that sums to more than 1 by rounding is normalised.
        log_rest_T: the log-probability of all other tokens together, where it is known better than as 1 minus the sum,
            because the kept ones were rounded: these are then scaled to share the rest of 1.
        temperature: tau of the stored log-probabilities; the student's logits are divided by it.

    Returns:
        A scalar in float32 (float64 for float64).

    Raises:
        ValueError: as `distill_loss`, and indices outside of the vocabulary or twice in a row, or rows of logits.
    """
    op = "distill_topk_loss"
    check_numbers(op, temperature, chunk, student_softcap=student_softcap)
    check_side(op, "student", student_TD, student_head_VD)
    check_biases(op, student_head_VD.shape[0], student_bias_V=student_bias_V)
    check_mask(op, student_TD.shape[0], mask_T)
    check_labels(op, student_TD.shape[0], student_head_VD.shape[0], labels_T, ce_weight)
    check_known(op, student_TD.shape[0], student_head_VD.shape[0], indices_TK, log_probs_TK)
    check_rest(op, student_TD.shape[0], log_rest_T)
    function = TOPK_BACKENDS.load(backend, student_TD.device)
    student_TD, indices_TK, log_probs_TK = _counted(mask_T, student_TD, indices_TK, log_probs_TK)
    labels = _counted(mask_T, labels_T)[0] if labels_T is not None and ce_weight else None
    student = Side(student_TD, student_head_VD, student_bias_V, student_scale, student_softcap)
    work = torch.promote_types(student.dtype, torch.float32)
    rest = None if log_rest_T is None else _counted(mask_T, log_rest_T.detach())[0]
    teacher = Buckets.of(indices_TK.long(), log_probs_TK.detach(), student_head_VD.shape[0], work, rest)
    objective = Objective("kl", temperature, 0.5, ce_weight, chunk)
    with torch.autocast(student_TD.device.type, enabled=False):
        result: Tensor = function(student, teacher, labels, objective)
    return result


def _counted(mask_T: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    """The tokens that count."""
    return [t if mask_T is None else t[mask_T] for t in tensors]
