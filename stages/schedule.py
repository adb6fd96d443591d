"""AdamW over two groups, mixers and the rest, with a warm-up / stable / decay schedule restarted in every stage."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .config import OptimConfig


def rate(step: int, steps: int, config: OptimConfig) -> float:
    """The share of the peak rate at `step` of `steps`: linear up, flat, linear down to `final_lr_ratio`."""
    warmup = config.warmup_percent / 100 * steps
    decay = config.decay_percent / 100 * steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    left = steps - step
    if left < decay:
        return config.final_lr_ratio + (1 - config.final_lr_ratio) * left / (decay + 1)
    return 1.0


def optimizer(mixers: Iterable[nn.Parameter], rest: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW; vectors (biases, decays, norms) are not decayed. Group 'rest' is left out where `rest_lr` is 0."""
    groups = []
    for lr, parameters in ((config.lr, list(mixers)), (config.rest_lr, list(rest) if config.rest_lr else [])):
        for decayed in (True, False):
            chosen = [p for p in parameters if (p.dim() > 1) == decayed]
            if chosen:
                groups.append({"params": chosen, "lr": lr, "peak": lr, "weight_decay": config.weight_decay if decayed else 0.0})
    return torch.optim.AdamW(groups, betas=config.betas, foreach=False, fused=False)


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
