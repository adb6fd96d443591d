"""Rates and clipping: peaks for mixers and rest, a warm-up / stable / decay schedule that restarts in every stage."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ssmorph.convert.optim import LOGARITHMS, RelativeAdamW

from .config import OptimConfig


def rate(step: int, steps: int, config: OptimConfig) -> float:
    """The share of the peak rate at `step` of `steps`: linear up, flat, down to `final_lr_ratio`."""
    warmup = config.warmup_percent / 100 * steps
    decay = config.decay_percent / 100 * steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    left = steps - step
    if left < decay:
        height = left / (decay + 1)
        if config.decay_shape == "cosine":
            height = (1 - math.cos(math.pi * height)) / 2
        return config.final_lr_ratio + (1 - config.final_lr_ratio) * height
    return 1.0


# the papers' optimiser has torch's
EPS = {"relative": 1e-12, "adamw": 1e-8}


def depth_factors(layers: Mapping[str, int], count: int, ratio: float) -> dict[str, float]:
    """What the rate of each parameter is multiplied with: 1 in layer 0 and outside of layers (-1), `ratio` in the last.

    Args:
        layers: parameter name -> its decoder layer, of `count`.
    """
    return {name: ratio ** (max(layer, 0) / max(count - 1, 1)) for name, layer in layers.items()}


def optimizer(
    mixers: dict[str, nn.Parameter],
    rest: dict[str, nn.Parameter],
    config: OptimConfig,
    factors: Mapping[str, float] | None = None,
) -> RelativeAdamW:
    """A stage's optimiser; vectors (biases, decays, norms) have no weight decay; `rest` stays put at `rest_lr` 0.

    `factors` multiply peak rates by parameter name.
    """
    groups: list[dict[str, Any]] = []
    for lr, parameters in ((config.lr, mixers), (config.rest_lr, rest if config.rest_lr else {})):
        for name, p in parameters.items():
            decay = config.weight_decay if p.dim() > 1 else 0.0
            relative = config.kind == "relative" and name.rpartition(".")[2] not in LOGARITHMS
            peak = lr * (factors or {}).get(name, 1.0)
            groups.append({"params": [p], "lr": peak, "peak": peak, "weight_decay": decay, "relative": relative})
    return RelativeAdamW(groups, lr=config.lr, betas=config.betas, eps=EPS[config.kind])


def set_rate(optim: torch.optim.Optimizer, share: float) -> None:
    """Sets every group's rate to its peak times `share`."""
    for group in optim.param_groups:
        group["lr"] = group["peak"] * share


@torch.no_grad()
def clip_each(groups: dict[int, list[Tensor]], limit: float) -> dict[int, float]:
    """Clips the gradient norm of every layer on its own, so that one layer's spike does not silence the others.

    Returns:
        The norm of each group before clipping.
    """
    norms = {}
    for index, gradients in groups.items():
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
        norms[index] = float(norm)
        if norms[index] > limit:
            for g in gradients:
                g.mul_(limit / norm)
    return norms
