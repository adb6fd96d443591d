"""The loading contract for every family: caches, padding, packing, generation, saving; on states that matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import ssmorph.hf  # noqa: F401  registers the classes
from ssmorph.convert.modeling import SsmorphConfig, SsmorphForCausalLM
from tests.families.hybrids import EACH, close, tokens
from tests.families.tiny import family_teacher
from tests.models import tiny_hybrid

PLANS = {"some": (1, 3), "all": (0, 1, 2, 3)}


@pytest.fixture(scope="module", params=[(*pair, plan) for pair in EACH for plan in PLANS], ids="-".join)
def hybrid(request: pytest.FixtureRequest) -> Any:
    row, kind, plan = request.param
    return tiny_hybrid(kind, PLANS[plan], family_teacher(row))


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(1,), (2, 3, 4), (20, 21, 22, 39)], ids=str)
def test_cached_equals_uncached(hybrid: Any, cuts: tuple[int, ...]) -> None:
    x = tokens(2, 40)
    full = hybrid(x, use_cache=False).logits
    cache, parts = None, []
    for start, end in zip((0, *cuts), (*cuts, 40), strict=True):
        out = hybrid(x[:, start:end], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    assert close(torch.cat(parts, 1), full)
    assert cache.get_seq_length() == 40


@torch.no_grad()
def test_left_padded_rows_equal_rows_alone(hybrid: Any) -> None:
    rows = [tokens(1, n, seed=n) for n in (5, 1, 17)]
    width = 17
    x = torch.cat([torch.cat([torch.zeros(1, width - r.shape[1], dtype=torch.long), r], 1) for r in rows])
    mask = torch.tensor([[0] * (width - r.shape[1]) + [1] * r.shape[1] for r in rows])
    out = hybrid(x, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits
    for i, row in enumerate(rows):
        assert close(out[i : i + 1, -row.shape[1] :], hybrid(row).logits)


@torch.no_grad()
def test_padded_generation_equals_generation_alone(hybrid: Any) -> None:
    rows = [tokens(1, n, seed=n) for n in (6, 13)]
    x = torch.cat([torch.cat([torch.full((1, 13 - r.shape[1]), 258), r], 1) for r in rows])
    mask = (x != 258).long()
    batched = hybrid.generate(x, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None)
    for i, row in enumerate(rows):
        alone = hybrid.generate(row, max_new_tokens=8, do_sample=False, eos_token_id=None)[0, row.shape[1] :]
        sure = certain(hybrid, row, alone)
        assert torch.equal(batched[i, 13:][:sure], alone[:sure])
        assert sure > 0


def certain(model: Any, prompt: Tensor, new: Tensor) -> int:
    """How many greedy tokens are decided by a gap of at least 1e-4 between the best two."""
    logits = model(torch.cat([prompt, new[None]], 1)).logits[0, prompt.shape[1] - 1 : -1]
    best = logits.topk(2).values
    unsure = ((best[:, 0] - best[:, 1]) < 1e-4).nonzero()
    return int(unsure[0]) if len(unsure) else len(new)


@torch.no_grad()
def test_generation_with_and_without_cache(hybrid: Any) -> None:
    x = tokens(1, 9)
    with_cache = hybrid.generate(x, max_new_tokens=10, do_sample=False, eos_token_id=None)
    without = hybrid.generate(x, max_new_tokens=10, do_sample=False, eos_token_id=None, use_cache=False)
    sure = certain(hybrid, x, with_cache[0, 9:])
    assert sure > 0
    assert torch.equal(with_cache[0, : 9 + sure], without[0, : 9 + sure])


@torch.no_grad()
def test_beams_and_sampling(hybrid: Any) -> None:
    x = tokens(2, 7)
    options = {"max_new_tokens": 6, "eos_token_id": None, "attention_mask": torch.ones_like(x)}
    beams = [hybrid.generate(x, num_beams=3, do_sample=False, use_cache=cached, **options) for cached in (True, False)]
    assert torch.equal(*beams)
    torch.manual_seed(0)
    first = hybrid.generate(x, do_sample=True, **options)
    torch.manual_seed(0)
    assert torch.equal(first, hybrid.generate(x, do_sample=True, **options))


@torch.no_grad()
def test_packed_documents_equal_documents_alone(hybrid: Any) -> None:
    if hybrid.config.text_config.model_type == "falcon" and len(hybrid.mixers()) < 4:
        pytest.skip("transformers' Falcon does not separate packed documents in the attention that is kept")
    rows = [tokens(1, n, seed=n) for n in (9, 1, 14)]
    positions = torch.cat([torch.arange(r.shape[1]) for r in rows])[None]
    packed = hybrid(torch.cat(rows, 1), position_ids=positions, use_cache=False).logits
    start = 0
    for row in rows:
        assert close(packed[:, start : start + row.shape[1]], hybrid(row).logits)
        start += row.shape[1]


@torch.no_grad()
def test_save_and_load(hybrid: Any, tmp_path: Path) -> None:
    hybrid.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, SsmorphForCausalLM)
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == hybrid.config.tie_word_embeddings
    assert torch.equal(loaded(tokens(2, 20)).logits, hybrid(tokens(2, 20)).logits)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), SsmorphConfig)


def test_gradient_checkpointing_changes_nothing(hybrid: Any) -> None:
    gradients = []
    parameters = [p for m in hybrid.mixers().values() for p in m.parameters()]
    for enabled in (False, True):
        hybrid.train()
        if enabled:
            hybrid.activation_checkpointing_enable()
        for p in parameters:
            p.requires_grad_(True).grad = None
        hybrid(tokens(2, 20), use_cache=False).logits.square().mean().backward()
        gradients.append([p.grad.clone() for p in parameters if p.grad is not None])
    hybrid.activation_checkpointing_disable()
    hybrid.eval().requires_grad_(False)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert len(gradients[0]) > 5


@torch.no_grad()
def test_cache_reset_and_reorder(hybrid: Any) -> None:
    x = tokens(2, 12)
    cache = hybrid(x[:, :10], use_cache=True).past_key_values
    cache.reorder_cache(torch.tensor([1, 0]))
    swapped = hybrid(x[:, 10:].flip(0), past_key_values=cache).logits
    assert close(swapped.flip(0), hybrid(x).logits[:, 10:])
    cache.layers[next(iter(hybrid.mixers()))].reset()
    assert cache.layers[next(iter(hybrid.mixers()))].get_seq_length() == 0


@torch.no_grad()
def test_a_bare_cache_is_filled(hybrid: Any) -> None:
    x = tokens(1, 12)
    cache = DynamicCache()
    hybrid(x[:, :8], past_key_values=cache)
    assert close(hybrid(x[:, 8:], past_key_values=cache).logits, hybrid(x).logits[:, 8:])
