"""What a forward gives for every family: rows apart, embeddings for ids, hidden states, attentions, caches gone on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.families.hybrids import EACH, close, some_layers, tokens


@pytest.fixture(scope="module", params=EACH, ids="-".join)
def hybrid(request: pytest.FixtureRequest) -> Any:
    return some_layers(*request.param)


@torch.no_grad()
def test_a_row_alone_equals_the_row_in_a_batch(hybrid: Any) -> None:
    x = tokens(5, 19)
    batch = hybrid(x).logits
    assert all(close(batch[i : i + 1], hybrid(x[i : i + 1]).logits) for i in range(5))


@torch.no_grad()
def test_embeddings_stand_for_ids(hybrid: Any) -> None:
    x = tokens(2, 11)
    embedded = hybrid.get_input_embeddings()(x)
    assert close(hybrid(inputs_embeds=embedded).logits, hybrid(x).logits)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(x)}
    new = hybrid.generate(inputs_embeds=embedded, **options)
    assert torch.equal(new, hybrid.generate(x, **options)[:, 11:])


@torch.no_grad()
def test_hidden_states_keep_the_teachers_convention(hybrid: Any) -> None:
    """Embeddings, each layer but the last, then the final norm's output: what the head reads."""
    x = tokens(2, 11)
    out = hybrid(x, output_hidden_states=True)
    assert len(out.hidden_states) == hybrid.config.num_hidden_layers + 1
    assert torch.equal(out.hidden_states[-1], hybrid.base_model(x).last_hidden_state)
    assert all(h.shape == (2, 11, hybrid.config.hidden_size) for h in out.hidden_states)


@torch.no_grad()
def test_a_cache_can_be_copied_and_gone_on_from_twice(hybrid: Any) -> None:
    x = tokens(2, 24)
    other = torch.cat([x[:, :13], tokens(2, 11, seed=1)], 1)
    kept = hybrid(x[:, :13], use_cache=True).past_key_values
    for whole in (x, other, x):
        cache = copy.deepcopy(kept)
        first = hybrid(whole[:, 13:14], past_key_values=cache).logits
        rest = hybrid(whole[:, 14:], past_key_values=cache).logits
        assert close(torch.cat([first, rest], 1), hybrid(whole).logits[:, 13:])
    assert kept.get_seq_length() == 13


@torch.no_grad()
def test_a_hundred_prompts_cached_and_uncached(hybrid: Any) -> None:
    x = tokens(100, 12, seed=3)
    out = hybrid(x[:, :8], use_cache=True)
    parts = [out.logits]
    for i in range(8, 12):
        out = hybrid(x[:, i : i + 1], past_key_values=out.past_key_values)
        parts.append(out.logits)
    assert close(torch.cat(parts, 1), hybrid(x, use_cache=False).logits)


@torch.no_grad()
def test_a_hundred_left_padded_prompts_choose_what_they_choose_alone(hybrid: Any) -> None:
    lengths = torch.arange(100) % 12 + 1
    x = tokens(100, 12, seed=4)
    mask = (torch.arange(12) >= 12 - lengths[:, None]).long()
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "output_logits": True}
    options |= {"return_dict_in_generate": True, "pad_token_id": 258}
    padded = hybrid.generate(torch.where(mask.bool(), x, 258), attention_mask=mask, **options)
    for length in range(1, 13):
        rows = (lengths == length).nonzero()[:, 0]
        prompt = x[rows, 12 - length :]
        alone = hybrid.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        best = torch.stack(alone.logits, 1).topk(2).values
        sure = ((best[..., 0] - best[..., 1]) > 1e-4).long().cumprod(1).bool()
        assert sure.float().mean() > 0.7
        assert torch.equal(padded.sequences[rows, 12:][sure], alone.sequences[:, length:][sure])
