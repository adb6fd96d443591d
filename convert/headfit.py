"""Closed forms for one layer's heads: which decay, how much of q.k, of a plain average, and of the token itself.

A head's softmax is positive and mostly diffuse, the raw product q.k is neither: to first order exp(q.k) = 1 + q.k, so a
copied head lacks the 1. Here one of the N state channels is made constant to carry it, the one whose loss changes q.k
least in a basis that balances both sides. For each decay of a grid the head's output is regressed on three scans:

    o_t ~ gamma sum_s a^(t-s) (q_t.k_s) v_s  +  beta sum_s a^(t-s) v_s  +  delta v_t

B batch, L length, D model width, H heads, P head width, N state width, R regressors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssmorph.kernels.ssd import ssd

DISTANCES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 1024.0)


class HeadFit(NamedTuple):
    """Per head: mean distance of its decay, weights of the three terms, and the share of |o|^2 left unexplained."""

    distance_H: Tensor
    gamma_H: Tensor
    beta_H: Tensor
    delta_H: Tensor
    error_H: Tensor


def balanced_basis(q_THN: Tensor, k_THN: Tensor) -> tuple[Tensor, Tensor]:
    """Transforms [H, N, N] of q and k that keep q.k and give both the same diagonal second moments, largest first.

    Balanced truncation: dropping the last coordinate is the least change of q.k for uncorrelated queries and keys.
    A side that is zero throughout, as in a pruned head, stays so.
    """
    q, k = q_THN.double(), k_THN.double()
    moments = [torch.einsum("thn,thm->hnm", t, t) / t.shape[0] for t in (q, k)]
    eye = torch.eye(q.shape[-1], dtype=torch.float64, device=q.device)
    size = [or_one(m.diagonal(dim1=-2, dim2=-1).mean(-1))[:, None, None] for m in moments]
    root_q, root_k = (torch.linalg.cholesky(m + 1e-6 * s * eye) for m, s in zip(moments, size, strict=True))
    u, s, vh = torch.linalg.svd(root_q.transpose(-1, -2) @ root_k)
    shrink = s.rsqrt().unsqueeze(-1)
    return shrink * (vh @ root_k.transpose(-1, -2)), shrink * (u.transpose(-1, -2) @ root_q.transpose(-1, -2))


def fit_heads(
    q_BLHN: Tensor, k_BLHN: Tensor, v_BLHP: Tensor, o_BLHP: Tensor, distances: Tensor | None = None
) -> HeadFit:
    """The best three weights and decay of every head; `distances` [H] fixes the decays instead of searching them."""
    heads = v_BLHP.shape[2]
    grid = (
        [torch.full((heads,), d, dtype=torch.float64) for d in DISTANCES] if distances is None else [distances.double()]
    )
    fits = [_fit_decay(d_H, q_BLHN, k_BLHN, v_BLHP, o_BLHP) for d_H in grid]
    stacked = HeadFit(*(torch.stack(part) for part in zip(*fits, strict=True)))
    best_H = stacked.error_H.argmin(0)
    return HeadFit(*(part.gather(0, best_H.unsqueeze(0))[0] for part in stacked))


def _fit_decay(distance_H: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> HeadFit:
    log_a_BLH = -torch.log1p(1 / distance_H).to(v).expand(v.shape[:3])
    ones = v.new_ones(*v.shape[:3], 1)
    regressors = [ssd(v, log_a_BLH, k, q)[0], ssd(v, log_a_BLH, ones, ones)[0], v]
    gram_HRR = torch.stack([torch.stack([_products(a, b) for b in regressors], -1) for a in regressors], -2)
    cross_HR = torch.stack([_products(a, o) for a in regressors], -1)
    # a regressor that is zero throughout gets weight 0
    ridge = 1e-6 * or_one(gram_HRR.diagonal(dim1=-2, dim2=-1))
    weights_HR = torch.linalg.solve(gram_HRR + torch.diag_embed(ridge), cross_HR)
    total_H = _products(o, o).clamp_min(1e-30)
    error_H = 1 - (weights_HR * cross_HR).sum(-1) / total_H
    gamma_H, beta_H, delta_H = weights_HR.unbind(-1)
    return HeadFit(distance_H.to(error_H), gamma_H, beta_H, delta_H, error_H)


def _products(a_BLHP: Tensor, b_BLHP: Tensor) -> Tensor:
    """Sum of products over tokens and channels, [H]: each window in its own precision, windows in float64."""
    return (a_BLHP * b_BLHP).sum((1, 3)).double().sum(0)


def or_one(size: Tensor) -> Tensor:
    """The sizes; 1 for what is zero, which nothing can be measured by."""
    return size.where(size > 0, 1)
