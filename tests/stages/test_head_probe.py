"""The head probe: its text, its gates against a head that is really taken away, and a head made to fetch."""

from __future__ import annotations

import pytest
import torch

from ssmorph.convert.families import FAMILIES
from ssmorph.convert.tiny import byte_tokenizer
from ssmorph.stages.head_probe import gated_heads, head_importance, key_value_probes, value_loss
from tests.models import tiny_teacher

LLAMA = FAMILIES["llama"]


def test_every_value_asked_for_was_stated_behind_the_same_key() -> None:
    tokens_BL, asked_T = key_value_probes(byte_tokenizer(), seed=0, probes=3, pairs=5)
    assert tokens_BL.shape == (3, 30)
    for row in tokens_BL.tolist():
        stated = {row[i]: row[i + 1] for i in range(0, 15, 3)}
        assert len(stated) == len(set(stated.values())) == 5
        assert [stated[row[i - 1]] for i in asked_T.tolist()] == [row[i] for i in asked_T.tolist()]
    assert not torch.equal(tokens_BL[0], tokens_BL[1])
    assert torch.equal(tokens_BL, key_value_probes(byte_tokenizer(), seed=0, probes=3, pairs=5)[0])


def test_importance_is_the_slope_of_taking_a_head_away() -> None:
    teacher, tokenizer = tiny_teacher(), byte_tokenizer()
    found = head_importance(teacher, LLAMA, tokenizer, seed=0, probes=1, pairs=6)
    assert found.shape == (4, 6)
    tokens_BL, asked_T = key_value_probes(tokenizer, 0, 1, 6)
    for layer, head in ((0, 0), (3, 4)):
        losses = []
        for change in (-1e-2, 1e-2):
            gates = [torch.ones(1, 6) for _ in range(4)]
            gates[layer][0, head] += change
            with torch.no_grad(), gated_heads(teacher, LLAMA, gates):
                losses.append(value_loss(teacher, tokens_BL, asked_T)[0])
        assert float(found[layer, head]) == pytest.approx(abs(float(losses[1] - losses[0])) / 2e-2, rel=0.05)


def test_a_head_whose_output_is_not_read_has_no_importance() -> None:
    teacher = tiny_teacher()
    with torch.no_grad():
        teacher.model.layers[2].self_attn.o_proj.weight[:, 8:16] = 0
    found = head_importance(teacher, LLAMA, byte_tokenizer(), seed=0, probes=2, pairs=4)
    assert (found == 0).nonzero().tolist() == [[2, 1]]


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="needs 600 ordinary tokens; got 25"):
        key_value_probes(byte_tokenizer(), seed=0, probes=1, pairs=300)
