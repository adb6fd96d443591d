"""The shortened path of one token against the general one, call by call and in what both leave behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from ssmorph.convert.mixers import windowed
from ssmorph.kernels.window_step import BACKENDS
from tests.families.hybrids import close, tokens
from tests.families.tiny import family_teacher
from tests.models import WINDOWED_HEADS, tiny_hybrid


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each call whether it took the short path; with `taken[:] = [None]` none may."""
    calls: list[Any] = []
    is_a_step = windowed.is_a_step

    def counted(q_BHLP: Tensor, scores: Any) -> bool:
        calls.append(bool(calls[:1] != [None] and is_a_step(q_BHLP, scores)))
        return calls[-1]

    monkeypatch.setattr(windowed, "is_a_step", counted)
    return calls


# gemma2 caps its scores; its layers with a window of their own take the general path
@torch.no_grad()
@pytest.mark.parametrize("backend", ["native", "chunked"])
@pytest.mark.parametrize("padded", [0, 3])
@pytest.mark.parametrize("start", [1, 12])
@pytest.mark.parametrize("kind", ["windowed_mamba2", "window", WINDOWED_HEADS])
@pytest.mark.parametrize("row", ["llama", "phi", "gemma2"])
def test_both_paths_agree(
    row: str, kind: str, start: int, padded: int, backend: str, taken: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = BACKENDS.refusal(backend, torch.device("cpu"))
    if refused is not None:
        pytest.skip(f"{backend}: {refused}")
    step = windowed.window_step
    monkeypatch.setattr(windowed, "window_step", lambda *args, **kwargs: step(*args, **kwargs, backend=backend))
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
