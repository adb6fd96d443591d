"""Layers chosen by name and by scores: each rule against what it claims, the spread one against all choices."""

from __future__ import annotations

import itertools

import pytest
import torch

from ssmorph.convert.families import AttentionShape
from ssmorph.convert.plan import (
    attention_bytes,
    cheapest_fitting,
    lowest,
    resolve_layers,
    spread_lowest,
    strategy_of,
)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("first-3", (0, 1, 2)),
        ("last-3", (5, 6, 7)),
        ("middle-3", (2, 3, 4)),
        ("middle-4", (2, 3, 4, 5)),
        ("uniform-3", (2, 5, 7)),
        ("loo-3", (2, 5, 7)),  # until it has scores
        ("first-0", ()),
        ("last-8", tuple(range(8))),
    ],
)
def test_k_layers_are_converted(layers: str, expected: tuple[int, ...]) -> None:
    assert resolve_layers(layers, 8) == expected


@pytest.mark.parametrize("name", ["first", "last", "middle", "loo"])
def test_more_layers_than_there_are_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"at most 8 layers to convert; got {name}-9"):
        resolve_layers(f"{name}-9", 8)


def test_names_of_strategies() -> None:
    assert strategy_of("loo-3") == ("loo", 3)
    assert strategy_of("kl") == ("kl", None)
    assert [strategy_of(text) for text in ("all", "uniform", "loo-", "loo-x", "best-3", (1, 2))] == [None] * 6


def test_the_lowest_scores_are_converted() -> None:
    assert lowest([3.0, 0.5, 2.0, 0.5, -1.0], 3) == (1, 3, 4)
    assert lowest([1.0, 1.0, 1.0], 2) == (1, 2)


def worth(scores: list[float], kept: tuple[int, ...]) -> float:
    count = len(scores) - len(kept)
    run, price = -(-count // (len(kept) + 1)), sum(scores) / len(scores)
    edges = (-1, *kept, len(scores))
    return sum(scores[i] for i in kept) - price * sum(max(0, b - a - 1 - run) for a, b in itertools.pairwise(edges))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kept", [1, 3, 4])
def test_spread_layers_are_the_best_of_all_choices(seed: int, kept: int) -> None:
    scores = torch.rand(9, generator=torch.Generator().manual_seed(seed)).pow(3).tolist()
    converted = spread_lowest(scores, 9 - kept)
    assert len(converted) == 9 - kept
    own = tuple(i for i in range(9) if i not in converted)
    best = max(worth(scores, choice) for choice in itertools.combinations(range(9), kept))
    assert worth(scores, own) == pytest.approx(best)


def test_spreading_outweighs_small_differences_and_no_large_ones() -> None:
    assert spread_lowest([1.01, 1.01, 1.0, 1.0, 1.0, 1.0], 4) == lowest([0, 1, 0, 0, 1, 0], 4)
    assert spread_lowest([9.0, 9.0, 0.1, 0.1, 0.1, 0.1], 4) == (2, 3, 4, 5)
    assert spread_lowest([1.0, 2.0], 2) == (0, 1)
    assert spread_lowest([1.0, 2.0], 0) == ()


def test_a_budget_takes_the_least_score_per_byte_and_no_layer_that_saves_nothing() -> None:
    held = [100, 100, 10, 40]
    # per byte saved of 20: 1/80, 0.2/80, never, 0.1/20
    scores = [1.0, 0.2, 0.0, 0.1]
    assert cheapest_fitting(scores, held, 20, 250) == ()
    assert cheapest_fitting(scores, held, 20, 249) == (1,)
    assert cheapest_fitting(scores, held, 20, 160) == (1, 3)
    assert cheapest_fitting(scores, held, 20, 70) == (0, 1, 3)
    with pytest.raises(ValueError, match=r"placement\.cache_mib: the smallest cache takes"):
        cheapest_fitting(scores, held, 20, 69)


def test_a_sliding_window_bounds_what_attention_holds() -> None:
    attention = AttentionShape(layers=2, hidden=48, heads=6, kv_heads=2, head_dim=8, scale=1.0, qkv_bias=False,
                               out_bias=False, eps=1e-5)  # fmt: skip
    assert attention_bytes(attention, [None, 16, 1000], 100, 4) == (12800, 2048, 12800)
