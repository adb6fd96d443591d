"""The shortened path of one token against the general one, call by call and in what both leave behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from ssmorph.convert.window import empty
from ssmorph.convert.window_step import Step
from tests.families.hybrids import close, tokens
from tests.families.tiny import family_teacher
from tests.models import WINDOWED_HEADS, tiny_hybrid


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each call whether it took the short path; with `taken[:] = [None]` none may."""
    calls: list[Any] = []
    answers = Step.answers

    def counted(q_BHLP: Tensor, scores: Any) -> bool:
        calls.append(bool(calls[:1] != [None] and answers(q_BHLP, scores)))
        return calls[-1]

    monkeypatch.setattr(Step, "answers", staticmethod(counted))
    return calls


# gemma2 caps its scores; its layers with a window of their own take the general path
@torch.no_grad()
@pytest.mark.parametrize("padded", [0, 3])
@pytest.mark.parametrize("start", [1, 12])
@pytest.mark.parametrize("kind", ["windowed_mamba2", "window", WINDOWED_HEADS])
@pytest.mark.parametrize("row", ["llama", "phi", "gemma2"])
def test_both_paths_agree(row: str, kind: str, start: int, padded: int, taken: list[Any]) -> None:
    hybrid = tiny_hybrid(kind, (1, 2, 3), family_teacher(row))
    text = tokens(2, start + padded + 16)
    mask = torch.ones_like(text)
    mask[0, :padded] = 0
    first = slice(0, start + padded)
    begun = hybrid(text[:, first], attention_mask=mask[:, first], use_cache=True).past_key_values

    def rest() -> tuple[Tensor, list[Tensor]]:
        cache, logits = copy.deepcopy(begun), []
        for end in range(start + padded + 1, text.shape[1] + 1):
            ids = text[:, end - 1 : end]
            logits.append(hybrid(ids, attention_mask=mask[:, :end], past_key_values=cache).logits)
        held = [t for i in hybrid.mixers() for t in cache.layers[i].tensors()]
        return torch.cat(logits, 1), held

    taken.clear()
    short, short_held = rest()
    assert any(taken)
    taken[:] = [None]
    general, general_held = rest()
    assert not any(taken[1:])
    assert close(short, general)
    assert [t.shape for t in short_held] == [t.shape for t in general_held]
    for own, expected in zip(short_held, general_held, strict=True):
        assert torch.equal(own, expected) if own.dtype in (torch.bool, torch.long) else close(own, expected)


def test_a_padded_token_is_not_counted_and_does_not_enter() -> None:
    k_BG1P = torch.randn(2, 1, 1, 4, generator=torch.Generator().manual_seed(0))
    held, valid = empty(k_BG1P, 3, 2), torch.tensor([[True], [False]])
    for _ in range(3):
        step = Step.of(held, k_BG1P, k_BG1P, valid)
        held = step.held(2)
    assert held.seen_B.tolist() == [3, 0]
    assert held.valid_BR.tolist() == [[True] * 3, [False] * 3]
    for number in range(3):
        step = Step.of(held, k_BG1P, k_BG1P, valid)
        held = step.held(2)
        # the first two become sinks, the third enters the state
        assert step.enters_B.tolist() == [number == 2, False]
    assert held.filled_BS.tolist() == [[True, True], [False, False]]
