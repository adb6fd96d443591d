"""Perplexity, KL(teacher || model), agreement and loyalty on held-out windows, by position, for any number of models.

B batch, L length, D model width, T tokens of one chunk, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ssmorph.convert.families import logits_of

from .loyalty import probability_gap, rank_correlation

# tokens whose logits exist at a time
CHUNK = 256
# nats whose exponential still is a number
LARGEST = 700


@dataclass(frozen=True)
class Candidate:
    """A model to score, inside a context that may alter it."""

    name: str
    model: Any
    context: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass
class Scores:
    """Sums over windows at every predicted position 1..L-1, float64."""

    nll_L: Tensor
    kl_L: Tensor
    agree_L: Tensor
    gap_L: Tensor
    rank_L: Tensor
    windows: int = 0

    @classmethod
    def empty(cls, length: int) -> Scores:
        """No windows yet."""
        nll_L, kl_L, agree_L, gap_L, rank_L = torch.zeros(5, length - 1, dtype=torch.float64)
        return cls(nll_L, kl_L, agree_L, gap_L, rank_L)

    @classmethod
    def merged(cls, parts: Sequence[Scores]) -> Scores:
        """The scores of all windows of `parts`, which are of one length."""
        columns = torch.stack([torch.stack([p.nll_L, p.kl_L, p.agree_L, p.gap_L, p.rank_L]) for p in parts])
        nll_L, kl_L, agree_L, gap_L, rank_L = columns.sum(0)
        return cls(nll_L, kl_L, agree_L, gap_L, rank_L, windows=sum(p.windows for p in parts))

    def summary(self, start: int = 0, end: int | None = None) -> dict[str, float]:
        """Means over the positions start..end: perplexity, kl (nats), top1 (share of tokens), and loyalty.

        `probability` is |p_t - p_s| of the teacher's likeliest token, `rank` Spearman's correlation over its ten.
        """
        part = slice(start, end)
        count = max(1, self.windows * len(self.nll_L[part]))
        sums = (self.nll_L, self.kl_L, self.agree_L, self.gap_L, self.rank_L)
        nll, kl, agree, gap, rank = (float(t[part].sum()) / count for t in sums)
        perplexity = math.inf if nll > LARGEST else math.exp(nll)
        return {"perplexity": perplexity, "kl": kl, "top1": agree, "probability": gap, "rank": rank, "tokens": count}


@torch.no_grad()
def score(teacher: Any, candidates: list[Candidate], windows_WL: Tensor) -> dict[str, Scores]:
    """Scores `teacher` (under that name) and every candidate on the same windows.

    Args:
        windows_WL: token windows, int64; each is one row of context, nothing is carried between windows.
    """
    length = windows_WL.shape[1]
    scores = {name: Scores.empty(length) for name in ["teacher", *(c.name for c in candidates)]}
    for tokens_1L in windows_WL.split(1):
        taught_LD = _body(teacher, tokens_1L)
        own = {}
        for candidate in candidates:
            with candidate.context():
                own[candidate.name] = (_body(candidate.model, tokens_1L), candidate.model)
        for start in range(0, length - 1, CHUNK):
            part = slice(start, min(start + CHUNK, length - 1))
            labels_T = tokens_1L[0, 1:][part]
            log_t = _log_probs(teacher, taught_LD[part])
            _add(scores["teacher"], part, log_t, log_t, labels_T)
            for name, (hidden_LD, model) in own.items():
                _add(scores[name], part, log_t, _log_probs(model, hidden_LD[part]), labels_T)
        for s in scores.values():
            s.windows += 1
    return scores


def _body(model: Any, tokens_1L: Tensor) -> Tensor:
    return model.base_model(tokens_1L.to(model.device), use_cache=False).last_hidden_state[0]


def _log_probs(model: Any, hidden_TD: Tensor) -> Tensor:
    return logits_of(model, hidden_TD).log_softmax(-1)


def _add(scores: Scores, part: slice, log_t_TV: Tensor, log_s_TV: Tensor, labels_T: Tensor) -> None:
    labels = labels_T.to(log_s_TV.device).unsqueeze(-1)
    scores.nll_L[part] -= log_s_TV.gather(-1, labels)[:, 0].double().cpu()
    if log_t_TV is log_s_TV:
        scores.agree_L[part] += 1
        scores.rank_L[part] += 1
        return
    kl_TV = torch.nn.functional.kl_div(log_s_TV, log_t_TV, log_target=True, reduction="none")
    scores.kl_L[part] += kl_TV.sum(-1).double().cpu()
    scores.agree_L[part] += (log_t_TV.argmax(-1) == log_s_TV.argmax(-1)).double().cpu()
    scores.gap_L[part] += probability_gap(log_t_TV, log_s_TV).double().cpu()
    scores.rank_L[part] += rank_correlation(log_t_TV, log_s_TV).cpu()


def by_position(scores: Scores, parts: int = 4) -> list[dict[str, float]]:
    """The summary of each of `parts` equal stretches of the window."""
    edges = [round(i * len(scores.nll_L) / parts) for i in range(parts + 1)]
    return [{"from": a, "to": b, **scores.summary(a, b)} for a, b in pairwise(edges)]
