"""The head probe: its text, its gates against a head that is really taken away, and a head made to fetch."""

from __future__ import annotations

import pytest
import torch

from ssmorph.convert.families import FAMILIES, family_of
from ssmorph.convert.tiny import byte_tokenizer
from ssmorph.stages.controls import windowed
from ssmorph.stages.head_probe import (
    far_heads,
    far_importance,
    gated_heads,
    head_importance,
    key_value_probes,
    value_loss,
)
from tests.families.hybrids import WITH_BOTH, close, tokens
from tests.families.tiny import family_teacher
from tests.models import starting_tokenizer, tiny_teacher

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


def test_a_probe_begins_as_the_tokenizer_begins_a_text() -> None:
    tokenizer = starting_tokenizer()
    tokens_BL, asked_T = key_value_probes(tokenizer, seed=0, probes=3, pairs=5)
    bare_BL, bare_T = key_value_probes(byte_tokenizer(), seed=0, probes=3, pairs=5)
    assert tokens_BL[:, 0].tolist() == [tokenizer.bos_token_id] * 3
    assert torch.equal(tokens_BL[:, 1:], bare_BL)
    assert torch.equal(asked_T, bare_T + 1)


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


def test_other_words_stand_between_pairs_and_questions() -> None:
    tokens_BL, asked_T = key_value_probes(byte_tokenizer(), seed=0, probes=2, pairs=5, gap=20)
    assert tokens_BL.shape == (2, 15 + 21 + 15)
    for row in tokens_BL.tolist():
        stated = {row[i]: row[i + 1] for i in range(0, 15, 3)}
        assert [stated[row[i - 1]] for i in asked_T.tolist()] == [row[i] for i in asked_T.tolist()]
        assert not {*row[15:36:3], *row[16:36:3]} & {*stated, *stated.values()}


@torch.no_grad()
@pytest.mark.parametrize("row", WITH_BOTH)
def test_gates_open_from_the_window_to_the_teacher(row: str) -> None:
    teacher = family_teacher(row)
    spec, x = family_of(teacher.config), tokens(2, 40)
    whole = teacher(x).logits
    with windowed(teacher, spec, [0, 1, 2, 3], 6, 2):
        narrow = teacher(x).logits
    assert not close(whole, narrow)
    for opening, expected in ((0.0, narrow), (1.0, whole)):
        with far_heads(teacher, spec, 6, 2, [torch.full((2, 6), opening)] * 4):
            assert close(teacher(x).logits, expected)
    assert torch.equal(teacher(x).logits, whole)


def test_far_importance_adds_up_to_what_windows_lose() -> None:
    """Integrated gradients are complete, but for their few steps."""
    teacher, tokenizer = tiny_teacher(), byte_tokenizer()
    found = far_importance(teacher, LLAMA, tokenizer, 6, 2, seed=0, probes=2)
    tokens_BL, asked_T = key_value_probes(tokenizer, 0, 2, gap=6)
    with torch.no_grad():
        whole = value_loss(teacher, tokens_BL, asked_T).mean()
        with windowed(teacher, LLAMA, [0, 1, 2, 3], 6, 2):
            narrow = value_loss(teacher, tokens_BL, asked_T).mean()
    assert abs(float(narrow - whole)) > 0.02
    assert float(found.sum()) == pytest.approx(float(narrow - whole), rel=0.05)


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="needs 600 ordinary tokens; got 25"):
        key_value_probes(byte_tokenizer(), seed=0, probes=1, pairs=300)
