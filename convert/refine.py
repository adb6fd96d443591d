"""A few gradient steps on one layer: what the closed forms cannot reach, its decays, taps, B, C and gate.

Every step sees one batch of the layer's own inputs, in order, and the teacher's output there. The output projection
moves along and is solved for anew afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .optim import LOGARITHMS, RelativeAdamW

BETAS = (0.9, 0.95)


@torch.enable_grad()
def refine(
    parameters: dict[str, nn.Parameter],
    output: Callable[[Tensor], Tensor],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    steps: int,
    lr: float,
) -> None:
    """`steps` steps of `parameters` towards the least |output(u) - y|^2 / |y|^2, in place.

    Args:
        lr: the first step's rate, relative to each row's size; it falls to 0.
    """
    frozen = [p for p in parameters.values() if not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    groups = [{"params": [p], "relative": name.rpartition(".")[2] not in LOGARITHMS} for name, p in parameters.items()]
    optim = RelativeAdamW(groups, lr=lr, betas=BETAS)
    for step in range(steps):
        for group in optim.param_groups:
            group["lr"] = lr * (1 - step / steps)
        u_BLD, y_BLD = (t[step % len(t)] for t in (inputs, targets))
        loss = (output(u_BLD) - y_BLD).square().sum() / y_BLD.square().sum().clamp_min(1e-30)
        for p, gradient in zip(parameters.values(), torch.autograd.grad(loss, list(parameters.values())), strict=True):
            p.grad = gradient
        optim.step()
    for p in parameters.values():
        p.grad = None
    for p in frozen:
        p.requires_grad_(False)
