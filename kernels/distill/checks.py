"""What the arguments of the distillation losses must satisfy. `op` is the function's name, for the errors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssmorph.errors import fail, nearest

from .objective import DIVERGENCES, IGNORED, Side

# a row of rounded log-probabilities may sum to a little more than 1
MOST_PROBABILITY = 1.05


def check_divergence(op: str, loss: str, beta: float) -> None:
    """A known name, and for 'jsd' a beta inside (0, 1)."""
    if loss not in DIVERGENCES:
        raise fail(f"{op}.loss", "must be a known divergence", repr(loss), nearest(loss, DIVERGENCES))
    if loss == "jsd" and not 0 < beta < 1:
        raise fail(f"{op}.beta", "must lie between 0 and 1", beta, "At the ends use 'kl' or 'reverse_kl'.")


def check_numbers(op: str, temperature: float, chunk: int | None, **caps: float | None) -> None:
    """Positive temperature, chunk and soft caps."""
    if not temperature > 0:
        raise fail(f"{op}.temperature", "must be positive", temperature, "Use 1 for none.")
    if chunk is not None and chunk < 1:
        raise fail(f"{op}.chunk", "must be at least 1 token", chunk, "Leave it out to have it chosen.")
    for name, cap in caps.items():
        if cap is not None and not cap > 0:
            raise fail(f"{op}.{name}", "must be positive", cap, "Use None for no soft cap.")


def check_side(op: str, name: str, hidden: Tensor, head: Tensor) -> None:
    """Hidden states [T, D] and head [V, D]."""
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1]:
        got = (tuple(hidden.shape), tuple(head.shape))
        raise fail(f"{op}.{name}", "needs hidden [T, D] and head [V, D]", got, "Flatten batch and length.")
    if not hidden.is_floating_point() or not head.is_floating_point():
        raise fail(f"{op}.{name}", "must be floating point", (hidden.dtype, head.dtype), "Give hidden states.")


def check_biases(op: str, vocabulary: int, **biases: Tensor | None) -> None:
    """[V] each."""
    for name, bias in biases.items():
        if bias is not None and tuple(bias.shape) != (vocabulary,):
            raise fail(f"{op}.{name}", f"must have shape ({vocabulary},)", tuple(bias.shape), "Check the head.")


def check_teacher(op: str, student: Tensor, student_head: Tensor, teacher: Tensor, teacher_head: Tensor) -> None:
    """As many tokens and rows of the head as the student."""
    if student.shape[0] != teacher.shape[0]:
        got_tokens = (student.shape[0], teacher.shape[0])
        raise fail(f"{op}.teacher_TE", "must have the student's tokens", got_tokens, "Run both on one batch.")
    if teacher_head.shape[0] != student_head.shape[0]:
        rule = f"must have {student_head.shape[0]} rows"
        raise fail(f"{op}.teacher_head_VE", rule, teacher_head.shape[0], "Use one vocabulary.")


def check_mask(op: str, tokens: int, mask: Tensor | None) -> None:
    """One boolean for each token."""
    if mask is not None and tuple(mask.shape) != (tokens,):
        raise fail(f"{op}.mask_T", f"must have shape ({tokens},)", tuple(mask.shape), "One value per token.")
    if mask is not None and mask.dtype != torch.bool:
        raise fail(f"{op}.mask_T", "must be boolean, True at tokens that count", mask.dtype, "Compare it with 0.")


def check_labels(op: str, tokens: int, vocabulary: int, labels: Tensor | None, ce_weight: float) -> None:
    """One label for each token, where the cross-entropy weighs something: of the vocabulary, or IGNORED."""
    if labels is None:
        if ce_weight:
            raise fail(f"{op}.labels_T", f"is needed with ce_weight {ce_weight}", None, "Give labels or weight 0.")
        return
    if tuple(labels.shape) != (tokens,):
        raise fail(f"{op}.labels_T", f"must have shape ({tokens},)", tuple(labels.shape), "One value per token.")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise fail(f"{op}.labels_T", "must be integers", labels.dtype, "Give the next tokens.")
    if ce_weight and tokens and ((labels >= vocabulary) | ((labels < 0) & (labels != IGNORED))).any():
        rule, reach = f"must lie in 0..{vocabulary - 1} or be {IGNORED}", (int(labels.min()), int(labels.max()))
        raise fail(f"{op}.labels_T", rule, reach, "Use the student's vocabulary.")


def check_known(op: str, tokens: int, vocabulary: int, indices: Tensor, log_probs: Tensor) -> None:
    """K different tokens of the vocabulary in each row, with log-probabilities."""
    for name, t in (("indices_TK", indices), ("log_probs_TK", log_probs)):
        if t.ndim != 2 or t.shape[0] != tokens or not 1 <= t.shape[1] <= vocabulary or t.shape != indices.shape:
            rule = f"must have shape ({tokens}, K), K at most {vocabulary}, as indices_TK"
            raise fail(f"{op}.{name}", rule, tuple(t.shape), "Flatten batch and length.")
    if indices.is_floating_point() or indices.dtype == torch.bool or not log_probs.is_floating_point():
        got = (indices.dtype, log_probs.dtype)
        raise fail(f"{op}.indices_TK", "must be integers, and log_probs_TK floating-point", got, "Swap them?")
    if not tokens:
        return
    sorted_TK = indices.sort(-1).values
    lowest, highest = sorted_TK[:, 0].min(), sorted_TK[:, -1].max()
    if lowest < 0 or highest >= vocabulary:
        rule, reach = f"must lie in 0..{vocabulary - 1}", (int(lowest), int(highest))
        raise fail(f"{op}.indices_TK", rule, reach, "Use the student's vocabulary.")
    if (sorted_TK[:, 1:] == sorted_TK[:, :-1]).any():
        raise fail(f"{op}.indices_TK", "must be different within a row", "a token twice", "Keep each token once.")
    largest = log_probs.float().exp().sum(-1).max()
    if not largest <= MOST_PROBABILITY:
        rule, do = "exp of each row must sum to at most 1", "Give log-probabilities, not logits."
        raise fail(f"{op}.log_probs_TK", rule, float(largest), do)


def check_ensemble(op: str, teachers: Sequence[Side], weights: Sequence[float]) -> None:
    """At least one teacher, each well formed and with a positive weight."""
    if not teachers or len(teachers) != len(weights):
        got = (len(teachers), len(weights))
        raise fail(f"{op}.teachers", "needs one or more, with a weight each", got, "Give as many weights.")
    if not all(0 < weight < float("inf") for weight in weights):
        raise fail(f"{op}.weights", "must be positive", tuple(weights), "Leave out a teacher that weighs nothing.")
    for number, side in enumerate(teachers):
        name = f"teachers[{number}]"
        check_side(op, name, side.hidden_TD, side.head_VD)
        check_biases(op, side.head_VD.shape[0], **{f"{name}.bias_V": side.bias_V})
        check_numbers(op, 1.0, None, **{f"{name}.softcap": side.softcap})


def check_rest(op: str, tokens: int, log_rest: Tensor | None) -> None:
    """A log-probability for each token."""
    if log_rest is None:
        return
    if tuple(log_rest.shape) != (tokens,) or not log_rest.is_floating_point():
        got = (tuple(log_rest.shape), log_rest.dtype)
        raise fail(f"{op}.log_rest_T", f"must have shape ({tokens},), floating-point", got, "One value per token.")
    if not (log_rest <= 0).all():
        raise fail(f"{op}.log_rest_T", "must be at most 0", float(log_rest.max()), "Give a log-probability.")
