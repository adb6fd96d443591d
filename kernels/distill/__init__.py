"""Distillation losses between two language-model heads, from hidden states, without holding [tokens, vocabulary]."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmorph.errors import fail, nearest

from ..common.dispatch import Backends
from .objective import DIVERGENCES, Objective

BACKENDS = Backends(
    "distill_loss",
    {
        "chunked": "ssmorph.kernels.distill.chunked:distill_chunked",
        "reference": "ssmorph.kernels.distill.reference:distill_reference",
    },
)

__all__ = ["BACKENDS", "DIVERGENCES", "distill_loss"]

# stands for a bias of -inf: its probability is exactly 0, and 0 times its log is 0 where 0 times -inf is NaN
_NEVER = -1e30


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
    chunk: int = 128,
    backend: str | None = None,
) -> Tensor:
    """Mean over tokens of tau^2 d(p, q), p = softmax(teacher / tau), q = softmax(student / tau), plus ce_weight * CE.

    d is KL(p || q) for 'kl', KL(q || p) for 'reverse_kl', and beta KL(p || m) + (1 - beta) KL(q || m) with
    m = beta p + (1 - beta) q for 'jsd' [GKD, eq. 1]. Logits are cap * tanh(scale * (hidden @ head^T + bias) / cap).
    Gradients go to the student's hidden states, head and bias, as far as they require any; the teacher's side gets
    none. A frozen student head costs no head gradient. Computed in float32 (float64 for float64).

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
        chunk: tokens whose logits are held at once.
        backend: a name of `BACKENDS`; left out, SSMORPH_BACKEND or the best for the device.

    Returns:
        A scalar in float32 (float64 for float64).

    Raises:
        ValueError: an unknown loss or backend, shapes or vocabularies that disagree, a ce_weight without labels, or a
            number out of its range.
    """
    _check_numbers(loss, temperature, beta, chunk, student_softcap, teacher_softcap)
    _check_shapes(student_TD, student_head_VD, teacher_TE, teacher_head_VE, student_bias_V, teacher_bias_V)
    _check_tokens(student_TD.shape[0], labels_T, ce_weight, mask_T)
    function = BACKENDS.load(backend, student_TD.device)
    labels = labels_T if ce_weight else None
    if mask_T is not None:
        student_TD, teacher_TE = student_TD[mask_T], teacher_TE[mask_T]
        labels = None if labels is None else labels[mask_T]
    work = torch.promote_types(student_TD.dtype, torch.float32)
    student = _side(student_TD, student_head_VD, student_bias_V, student_scale, work)
    with torch.no_grad():
        teacher = _side(teacher_TE, teacher_head_VE, teacher_bias_V, teacher_scale, work)
    objective = Objective(loss, temperature, beta, ce_weight, student_softcap, teacher_softcap, chunk)
    with torch.autocast(student_TD.device.type, enabled=False):
        result: Tensor = function(*student, *teacher, labels, objective)
    return result


def _side(
    hidden: Tensor, head: Tensor, bias: Tensor | None, scale: float, work: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states, head and bias in the working dtype, the factor of the logits already inside."""
    hidden, head = hidden.to(work), head.to(work)
    if scale != 1.0:
        hidden = hidden * scale
    return hidden, head, None if bias is None else (bias.to(work) * scale).clamp(min=_NEVER)


def _check_numbers(
    loss: str, temperature: float, beta: float, chunk: int, student_cap: float | None, teacher_cap: float | None
) -> None:
    if loss not in DIVERGENCES:
        raise fail("distill_loss.loss", "must be a known divergence", repr(loss), nearest(loss, DIVERGENCES))
    if not temperature > 0:
        raise fail("distill_loss.temperature", "must be positive", temperature, "Use 1 for none.")
    if loss == "jsd" and not 0 < beta < 1:
        raise fail("distill_loss.beta", "must lie between 0 and 1", beta, "At the ends use 'kl' or 'reverse_kl'.")
    if chunk < 1:
        raise fail("distill_loss.chunk", "must be at least 1 token", chunk, "Leave it out for 128.")
    for name, cap in (("student_softcap", student_cap), ("teacher_softcap", teacher_cap)):
        if cap is not None and not cap > 0:
            raise fail(f"distill_loss.{name}", "must be positive", cap, "Use None for no soft cap.")


def _check_shapes(
    student: Tensor,
    student_head: Tensor,
    teacher: Tensor,
    teacher_head: Tensor,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
) -> None:
    for name, hidden, head in (("student", student, student_head), ("teacher", teacher, teacher_head)):
        if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1]:
            got = (tuple(hidden.shape), tuple(head.shape))
            raise fail(f"distill_loss.{name}", "needs hidden [T, D] and head [V, D]", got, "Flatten batch and length.")
    if student.shape[0] != teacher.shape[0]:
        got_tokens = (student.shape[0], teacher.shape[0])
        raise fail("distill_loss.teacher_TE", "must have the student's tokens", got_tokens, "Run both on one batch.")
    vocabulary = student_head.shape[0]
    if teacher_head.shape[0] != vocabulary:
        got_rows = teacher_head.shape[0]
        raise fail("distill_loss.teacher_head_VE", f"must have {vocabulary} rows", got_rows, "Use one vocabulary.")
    for name, bias in (("student_bias_V", student_bias), ("teacher_bias_V", teacher_bias)):
        if bias is not None and tuple(bias.shape) != (vocabulary,):
            raise fail(f"distill_loss.{name}", f"must have shape ({vocabulary},)", tuple(bias.shape), "Check the head.")


def _check_tokens(tokens: int, labels: Tensor | None, ce_weight: float, mask: Tensor | None) -> None:
    if ce_weight and labels is None:
        raise fail("distill_loss.labels_T", f"is needed with ce_weight {ce_weight}", None, "Give labels or weight 0.")
    for name, t in (("labels_T", labels), ("mask_T", mask)):
        if t is not None and tuple(t.shape) != (tokens,):
            raise fail(f"distill_loss.{name}", f"must have shape ({tokens},)", tuple(t.shape), "One value per token.")
    if mask is not None and mask.dtype != torch.bool:
        raise fail(
            "distill_loss.mask_T", "must be boolean, True at tokens that count", mask.dtype, "Compare it with 0."
        )
