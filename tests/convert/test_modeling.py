"""What of the loading contract needs no family: tests/families has the rest, for all of them."""

from __future__ import annotations

import copy
import importlib
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM

import ssmorph.hf  # noqa: F401  registers the classes
from ssmorph.convert.cache import padding_mask, segments
from ssmorph.convert.mixers.attending import FUNCTION
from ssmorph.convert.modeling import hybrid_of
from tests.models import tiny_hybrid, tiny_teacher


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(own: Tensor, expected: Tensor) -> bool:
    return bool((own - expected).abs().max() <= 1e-5 * expected.abs().max())


def test_zero_layers_converted_is_the_teacher_bit_for_bit() -> None:
    teacher = tiny_teacher()
    student = hybrid_of(teacher, {}, "test")
    assert torch.equal(student(tokens(2, 30)).logits, teacher(tokens(2, 30)).logits)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_choice_of_attention_is_kept(attention: str, tmp_path: Path) -> None:
    teacher = tiny_teacher()
    teacher.set_attn_implementation(attention)
    student = tiny_hybrid(teacher=teacher)
    for config in (teacher.config, student.config, student.config.text_config):
        assert config._attn_implementation == attention
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention)
    for config in (loaded.config, loaded.config.text_config, loaded.model.config):
        assert config._attn_implementation == attention


def test_what_is_done_to_a_hybrids_config_is_not_done_to_its_teacher() -> None:
    teacher = tiny_teacher()
    student = tiny_hybrid(teacher=teacher)
    student.set_attn_implementation("eager")
    student.config.text_config.vocab_size = 270
    assert teacher.config.vocab_size == 260
    assert teacher.config._attn_implementation == "sdpa"


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


@torch.no_grad()
def test_the_first_layer_alone_counts_tokens_for_the_kept_ones() -> None:
    student = tiny_hybrid("mamba2", (0,))
    x = tokens(2, 40)
    cache = student(x[:, :21], use_cache=True).past_key_values
    assert close(student(x[:, 21:], past_key_values=cache).logits, student(x, use_cache=False).logits[:, 21:])
    assert cache.get_seq_length() == 40


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


@pytest.mark.parametrize("kind", ["mamba2", "windowed_mamba2", "mamba2_heads"])
def test_a_copy_in_memory_is_the_model(kind: str) -> None:
    student = tiny_hybrid(kind)
    twin = copy.deepcopy(student)
    assert type(twin) is type(student)
    assert torch.equal(twin(tokens(1, 20)).logits, student(tokens(1, 20)).logits)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mamba2", "windowed_mamba2", "mamba2_heads"])
def test_a_whole_model_is_pickled(kind: str, tmp_path: Path) -> None:
    student = tiny_hybrid(kind)
    torch.save(student, tmp_path / "model.pt")
    AttentionInterface._global_mapping.pop(FUNCTION, None)
    for twin in (torch.load(tmp_path / "model.pt", weights_only=False), pickle.loads(pickle.dumps(student))):
        assert type(twin) is type(student)
        assert torch.equal(twin(tokens(1, 20)).logits, student(tokens(1, 20)).logits)
        assert twin.config.to_dict() == student.config.to_dict()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mamba2", "windowed_mamba2", "mamba2_heads"])
def test_threads_do_not_see_each_other(kind: str) -> None:
    student = tiny_hybrid(kind)
    texts = [tokens(1, 30 + i, seed=i) for i in range(4)]
    expected = [student(text).logits for text in texts]

    def asked(place: int) -> bool:
        with torch.no_grad():
            return all(torch.equal(student(texts[place]).logits, expected[place]) for _ in range(8))

    with ThreadPoolExecutor(len(texts)) as pool:
        assert all(pool.map(asked, range(len(texts))))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mamba2", "windowed_mamba2", "mamba2_heads"])
def test_padding_is_no_document(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`generate` gives all of it position 0, which is also where documents begin."""
    valid, packed = torch.tensor([[False] * 3 + [True] * 4]), torch.tensor([[0, 0, 0, 0, 1, 2, 3]])
    assert segments(packed, valid) is None
    assert segments(packed) is not None
    second = segments(torch.tensor([[0, 0, 0, 1, 0, 1, 2]]), valid)
    assert second is not None
    assert second.tolist() == [[0, 0, 0, 0, 1, 1, 1]]
    student = tiny_hybrid(kind)
    found: list[Any] = []
    for module in ("base", "attending"):
        own = importlib.import_module(f"ssmorph.convert.mixers.{module}")
        monkeypatch.setattr(own, "segments", lambda *arguments: found.append(segments(*arguments)) or found[-1])
    student.generate(tokens(2, 9), attention_mask=torch.tensor([[0] * 4 + [1] * 5, [1] * 9]), max_new_tokens=2)
    assert found
    assert all(segment is None for segment in found)


def test_a_mask_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match="need a mask that is a tensor"):
        padding_mask(object(), 3)  # type: ignore[arg-type]


@torch.no_grad()
def test_a_cache_of_the_teacher_is_refused() -> None:
    teacher = tiny_teacher()
    filled = teacher(tokens(1, 9), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="must come from this hybrid; got keys and values in converted layer 1"):
        tiny_hybrid(teacher=teacher)(tokens(1, 1), past_key_values=filled)
