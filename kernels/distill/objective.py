"""What a distillation loss minimises, and what it is given.

T tokens, K kept tokens of the teacher, V vocabulary, D width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

DIVERGENCES = ("kl", "reverse_kl", "jsd")
IGNORED = -100  # label of a token without one, as in torch's cross_entropy
FLOOR = -100.0  # least log-probability of the teacher in the reverse KL: e^-100 is 0 in float32
# stands for a bias of -inf: its probability is exactly 0, and 0 times its log is 0 where 0 times -inf is NaN
NEVER = -1e30


@dataclass(frozen=True)
class Objective:
    """Arguments of `distill_loss` under the same names; `loss` is 'kl' for a teacher in buckets."""

    loss: str
    temperature: float
    beta: float
    ce_weight: float
    chunk: int | None


@dataclass(frozen=True)
class Side:
    """A model's end: its logits are softcap * tanh(scale * (hidden @ head^T + bias) / softcap)."""

    hidden_TD: Tensor
    head_VD: Tensor
    bias_V: Tensor | None
    scale: float
    softcap: float | None

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype of hidden states and head."""
        return torch.promote_types(self.hidden_TD.dtype, self.head_VD.dtype)

    def finish_(self, logits: Tensor) -> None:
        """Turns h W^T of some tokens, in place, into logits."""
        if self.bias_V is not None:
            logits.add_(self.bias_V.to(logits.dtype).clamp(min=NEVER))
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.mul_(1 / self.softcap).tanh_().mul_(self.softcap)

    def prepared(self, dtype: torch.dtype) -> Side:
        """In one dtype, with the scale inside the hidden states and the bias."""
        hidden, head, bias = self.hidden_TD.to(dtype), self.head_VD.to(dtype), self.bias_V
        if self.scale != 1.0:
            hidden = hidden * self.scale
        bias = None if bias is None else (bias.to(dtype) * self.scale).clamp(min=NEVER)
        return replace(self, hidden_TD=hidden, head_VD=head, bias_V=bias, scale=1.0)


@dataclass(frozen=True)
class Ensemble:
    """Several teachers as one: its logits are the weighted mean of theirs, scales and soft caps applied."""

    sides: tuple[Side, ...]
    weights: tuple[float, ...]

    @staticmethod
    def of(sides: Sequence[Side], weights: Sequence[float]) -> Side | Ensemble:
        """With weights that sum to 1; a single teacher stays what it is."""
        total = sum(weights)
        return Ensemble(tuple(sides), tuple(w / total for w in weights)) if len(sides) > 1 else sides[0]

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype of all sides."""
        return functools.reduce(torch.promote_types, (side.dtype for side in self.sides))

    def mean(self, product: Callable[[Side, Tensor], None], out_CV: Tensor, spare_CV: Tensor) -> None:
        """Writes the mean logits of some tokens; `product` writes h W^T of a side, one after another."""
        for number, (side, weight) in enumerate(zip(self.sides, self.weights, strict=True)):
            each_CV = spare_CV if number else out_CV
            product(side, each_CV)
            side.finish_(each_CV)
            if number:
                out_CV.add_(each_CV, alpha=weight)
            else:
                out_CV.mul_(weight)

    def prepared(self, dtype: torch.dtype) -> Ensemble:
        """Each side as `Side.prepared`."""
        return replace(self, sides=tuple(side.prepared(dtype) for side in self.sides))


@dataclass(frozen=True)
class Buckets:
    """A teacher of which K tokens are known, and the rest as one probability."""

    indices_TK: Tensor
    log_probs_TK: Tensor
    log_tail_T: Tensor

    @staticmethod
    def of(
        indices_TK: Tensor,
        log_probs_TK: Tensor,
        vocabulary: int,
        dtype: torch.dtype,
        log_rest_T: Tensor | None = None,
    ) -> Buckets:
        """With rows that sum to 1: rounded log-probabilities may sum to more, and a tail within rounding is 0.

        A tail that is given stays as it is, and the known tokens share what it leaves.
        """
        log_probs = log_probs_TK.to(dtype).clamp(min=NEVER)
        if log_rest_T is not None:
            tail_T = log_rest_T.to(dtype)
            left_T1 = torch.log(-torch.expm1(tail_T))[:, None] - log_probs.logsumexp(-1, keepdim=True)
            return Buckets(indices_TK, (log_probs + left_T1).clamp(min=NEVER), tail_T.clamp(min=NEVER))
        total_T1 = log_probs.exp().sum(-1, keepdim=True)
        tail_T = 1 - total_T1[:, 0]
        small = tail_T < 16 * torch.finfo(dtype).eps
        if indices_TK.shape[1] == vocabulary:
            small = torch.ones_like(small)
        log_probs = torch.where(small[:, None], log_probs - total_T1.log(), log_probs)
        return Buckets(indices_TK, log_probs, tail_T.masked_fill(small, 0).log().clamp(min=NEVER))


def cross_entropy_share(labels_T: Tensor | None, objective: Objective) -> Tensor | None:
    """What a labelled token's cross-entropy weighs where a divergence weighs 1; a tensor, not to wait for a GPU."""
    if labels_T is None:
        return None
    return objective.ce_weight * labels_T.shape[0] / (labels_T != IGNORED).sum().clamp(min=1).double()


def chunk_rows(tokens: int, most: int, multiple: int = 1) -> int:
    """The rows of equal chunks, none larger than `most` rounded up to the multiple."""
    chunks = math.ceil(tokens / max(most, 1)) or 1
    return max(math.ceil(math.ceil(tokens / chunks) / multiple) * multiple, 1)
