"""Masks of four dimensions: causal ones are understood, others refused, transformers' own not looked at."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.masking_utils import create_masks_for_generate

from ssmorph.convert import modeling
from tests.families.hybrids import close, tokens
from tests.families.tiny import family_teacher
from tests.models import tiny_hybrid


def masked(*lengths: int) -> Tensor:
    """A mask of four dimensions for documents one behind the other, [1, 1, L, L]."""
    blocks = [torch.ones(n, n, dtype=torch.bool).tril() for n in lengths]
    return torch.block_diag(*blocks).bool()[None, None]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mamba2", "windowed_mamba2", "mamba2_heads"])
@pytest.mark.parametrize("additive", [False, True])
def test_a_mask_of_four_dimensions_is_understood_or_refused(kind: str, additive: bool) -> None:
    student, x = tiny_hybrid(kind), tokens(1, 22)

    def given(mask: Tensor) -> Tensor:
        return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min) if additive else mask

    positions = torch.cat([torch.arange(10), torch.arange(12)])[None]
    two = given(masked(10, 12))
    with pytest.raises(
        ValueError, match=r"attention_mask: must be causal .* row 0 where token 10 does not see 0\. Give"
    ):
        student(x, attention_mask=two)
    with pytest.raises(ValueError, match="token 10 sees 0"):
        student(x, attention_mask=given(masked(22)), position_ids=positions)
    with pytest.raises(ValueError, match="token 0 sees 1"):
        student(x, attention_mask=given(torch.ones_like(masked(22))))
    packed = student(x, attention_mask=two, position_ids=positions, use_cache=False).logits
    assert close(packed[:, 10:], student(x[:, 10:]).logits)
    assert close(student(x, attention_mask=given(masked(22))).logits, student(x).logits)
    left = masked(22)
    left[..., :5] = False
    right = masked(22)
    right[..., 17:] = False
    assert close(student(x, attention_mask=given(left)).logits[:, 5:], student(x[:, 5:]).logits)
    assert close(student(x, attention_mask=given(right)).logits[:, :17], student(x[:, :17]).logits)
    for mask, first in ((masked(22), 0), (left, 5)):
        cache = student(x[:, :9], attention_mask=given(mask[..., :9, :9]), use_cache=True).past_key_values
        rest = student(x[:, 9:], attention_mask=given(mask[..., 9:, :]), past_key_values=cache).logits
        assert close(rest, student(x[:, first:]).logits[:, 9 - first :])


@torch.no_grad()
@pytest.mark.parametrize("row", ["llama", "mistral", "gemma3", "gpt_neox"])
def test_only_what_a_caller_gives_is_checked(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what transformers makes of [batch, tokens], given by a caller, is right, sliding windows too."""
    student, x, checked = tiny_hybrid(teacher=family_teacher(row)), tokens(2, 12), []
    check = modeling.check_mask
    monkeypatch.setattr(modeling, "check_mask", lambda *arguments: checked.append(check(*arguments)))
    mask = (torch.arange(12) >= torch.tensor([[5], [0]])).long()
    options = {"attention_mask": mask, "do_sample": False}
    student.generate(x, max_new_tokens=3, **options)
    student.generate(x, max_new_tokens=3, num_beams=2, **options)
    assert not checked
    expected = student(x, attention_mask=mask).logits
    embedded = student.get_input_embeddings()(x)
    made = create_masks_for_generate(student.config.text_config, embedded, attention_mask=mask, past_key_values=None)
    own = student(x, attention_mask=made).logits
    assert checked
    assert close(own[0, 5:], expected[0, 5:])
    assert close(own[1], expected[1])
