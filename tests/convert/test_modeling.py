"""The loading contract: caches, padding, packing, generation, saving. On models whose states demonstrably matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import ssmorph.hf  # noqa: F401  registers the classes
from ssmorph.convert.modeling import SsmorphConfig, SsmorphForCausalLM, hybrid_of
from tests.models import tiny_hybrid, tiny_teacher

PLANS = {"some": (1, 3), "first": (0,), "all": (0, 1, 2, 3)}


@pytest.fixture(scope="module", params=[(k, p) for k in ("mamba2", "discrete_mamba2") for p in PLANS], ids="-".join)
def hybrid(request: pytest.FixtureRequest) -> Any:
    kind, plan = request.param
    return tiny_hybrid(kind, PLANS[plan])


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(own: Tensor, expected: Tensor) -> bool:
    return bool((own - expected).abs().max() <= 1e-5 * expected.abs().max())


def test_zero_layers_converted_is_the_teacher_bit_for_bit() -> None:
    teacher = tiny_teacher()
    student = hybrid_of(teacher, {}, "test")
    assert torch.equal(student(tokens(2, 30)).logits, teacher(tokens(2, 30)).logits)


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
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(tokens(2, 20)).logits, hybrid(tokens(2, 20)).logits)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), SsmorphConfig)


def test_loading_leaves_nothing_uninitialised(tmp_path: Path) -> None:
    student = tiny_hybrid()
    student.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert all(p.device.type == "cpu" and torch.isfinite(p).all() for p in loaded.parameters())
    assert loaded.state_dict().keys() == student.state_dict().keys()


def test_push_to_hub_writes_what_save_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = tiny_hybrid()
    seen: dict[str, list[str]] = {}

    def upload(_self: Any, folder: str, *_args: Any, **_kwargs: Any) -> None:
        seen["files"] = sorted(p.name for p in Path(folder).iterdir())

    monkeypatch.setattr("transformers.utils.hub.hf_api", MagicMock())
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", MagicMock())
    monkeypatch.setattr("transformers.utils.hub.PushToHubMixin._upload_modified_files", upload)
    student.push_to_hub("me/x")
    student.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors", "modeling_ssmorph.py"} <= set(seen["files"])
    assert {p.name for p in tmp_path.iterdir()} <= set(seen["files"])


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


def test_what_cannot_work_is_refused_by_name() -> None:
    student = tiny_hybrid()
    with pytest.raises(ValueError, match="dynamic cache"):
        student.generate(tokens(1, 5), max_new_tokens=3, cache_implementation="static")
    cache = student(tokens(1, 5), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-3)


def test_right_padding_leaves_the_state_alone() -> None:
    student = tiny_hybrid("mamba2", (0, 1, 2, 3))
    x = tokens(1, 10)
    mask = torch.tensor([[1] * 7 + [0] * 3])
    with torch.no_grad():
        padded = student(x, attention_mask=mask, use_cache=True).past_key_values
        alone = student(x[:, :7], use_cache=True).past_key_values
    assert close(padded.layers[0].recurrent_states[0], alone.layers[0].recurrent_states[0])
