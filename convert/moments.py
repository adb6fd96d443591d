"""Streaming least squares: the normal equations of a linear map, in float64, whatever the number of tokens."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """F'F, F'Y and |Y|^2 of features F and targets Y (T of them)."""

    def __init__(self, features: int, targets: int, device: torch.device) -> None:
        self.gram_FF = torch.zeros(features, features, dtype=torch.float64, device=device)
        self.cross_FT = torch.zeros(features, targets, dtype=torch.float64, device=device)
        self.target_square = 0.0

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Adds tokens: features [..., F] and targets [..., T]."""
        f, t = features.flatten(0, -2), targets.flatten(0, -2)
        # products over one batch are exact enough in float32; their sum over the corpus is not
        self.gram_FF += f.T @ f
        self.cross_FT += f.T @ t
        self.target_square += float(t.double().square().sum())

    def solve(self, ridge: float, prior_TF: Tensor) -> Tensor:
        """Weight [T, F] that minimises |Y - F W'|^2 + ridge |W - prior|^2, each feature measured at its own scale."""
        scale_F = self.gram_FF.diagonal().clamp_min(1e-30)
        prior_FT = prior_TF.T.double()
        system_FF = self.gram_FF + torch.diag(ridge * scale_F)
        return (prior_FT + torch.linalg.solve(system_FF, self.cross_FT - self.gram_FF @ prior_FT)).T

    def error(self, weight_TF: Tensor) -> float:
        """|Y - F W'|^2 / |Y|^2."""
        w = weight_TF.T.double()
        residual = self.target_square - 2 * (w * self.cross_FT).sum() + (w * (self.gram_FF @ w)).sum()
        return float(residual) / max(self.target_square, 1e-30)
