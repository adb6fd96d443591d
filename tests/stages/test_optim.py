"""Optimisers and schedules: the plain one is torch's AdamW, the relative one moves rows by their size."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from ssmorph.convert.optim import FLOOR
from ssmorph.stages.config import OptimConfig
from ssmorph.stages.schedule import depth_factors, optimizer, rate, set_rate


def parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    scale = torch.logspace(-3, 2, 5)[:, None]
    return {"in_proj.weight": nn.Parameter(scale * torch.randn(5, 4)), "A_log": nn.Parameter(torch.randn(5))}


def steps(config: OptimConfig, count: int = 4) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """What our optimiser and torch's make of the same gradients."""
    ours, theirs = parameters(), parameters()
    optim = optimizer(ours, {}, config)
    decayed = {"params": [theirs["in_proj.weight"]], "weight_decay": config.weight_decay}
    torchs = torch.optim.AdamW(
        [decayed, {"params": [theirs["A_log"]], "weight_decay": 0.0}], lr=config.lr, betas=config.betas
    )
    for _ in range(count):
        set_rate(optim, 1.0)
        for name in ours:
            ours[name].grad = torch.randn_like(ours[name])
            theirs[name].grad = ours[name].grad.clone()
        optim.step()
        torchs.step()
    return ours, theirs


def test_the_papers_optimiser_is_torchs() -> None:
    ours, theirs = steps(OptimConfig(kind="adamw", lr=0.01, weight_decay=0.1, betas=(0.9, 0.98)))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name])


def test_the_relative_optimiser_moves_rows_by_their_size() -> None:
    start, (ours, _) = parameters(), steps(OptimConfig(lr=0.01), count=1)
    before, after = start["in_proj.weight"].detach(), ours["in_proj.weight"].detach()
    moved, size = ((t.square().mean(1).sqrt()) for t in (after - before, before))
    whole = before.square().mean().sqrt()
    # rows much smaller than their tensor move as if they had a share of its size
    torch.testing.assert_close(moved, 0.01 * size.maximum(FLOOR * whole), rtol=1e-3, atol=1e-7)
    assert size[0] < FLOOR * whole < size[-1]


def test_rates_change_by_equal_factors_with_depth() -> None:
    layers = {"first": 0, "middle": 2, "last": 4, "embedding": -1}
    factors = depth_factors(layers, 5, 0.25)
    assert factors == {"first": 1.0, "middle": 0.5, "last": 0.25, "embedding": 1.0}
    named = {name: nn.Parameter(torch.randn(3, 2)) for name in layers}
    rest = {"embedding": named.pop("embedding")}
    optim = optimizer(named, rest, OptimConfig(lr=0.1, rest_lr=0.01), factors)
    set_rate(optim, 0.5)
    assert [group["lr"] for group in optim.param_groups] == [0.05, 0.025, 0.0125, 0.005]
    assert set(depth_factors(layers, 5, 1.0).values()) == {1.0}
    assert depth_factors({"only": 0}, 1, 3.0) == {"only": 1.0}


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_rates_rise_stay_and_fall_to_their_share(shape: str) -> None:
    config = OptimConfig(warmup_percent=10, decay_percent=50, decay_shape=shape, final_lr_ratio=0.1)  # type: ignore[arg-type]
    shares = [rate(step, 1000, config) for step in range(1000)]
    assert all(a < b for a, b in itertools.pairwise(shares[:100]))
    assert set(shares[101:500]) == {1.0}
    assert all(a > b for a, b in itertools.pairwise(shares[500:]))
    assert shares[-1] == pytest.approx(0.1, abs=3e-3)
    quarter = {"linear": 0.775, "cosine": 0.868}[shape]
    assert shares[625] == pytest.approx(quarter, abs=3e-3)
