"""Saving and loading for every family: in shards, in bfloat16, with a device map, with a resized vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import ssmorph.hf  # noqa: F401  registers the classes
from tests.families.hybrids import EACH, KINDS, close, some_layers, tokens
from tests.models import WINDOWED_HEADS


@pytest.fixture(scope="module", params=EACH, ids="-".join)
def hybrid(request: pytest.FixtureRequest) -> Any:
    return some_layers(*request.param)


@pytest.fixture(scope="module")
def saved(hybrid: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hybrid on disk, in many files."""
    folder = tmp_path_factory.mktemp("saved")
    hybrid.save_pretrained(folder, max_shard_size="40KB")
    return folder


def tied(model: Any) -> bool:
    """Whether input and output embeddings are one tensor."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}], ids=str)
def test_shards_load_and_leave_nothing_uninitialised(hybrid: Any, saved: Path, options: dict[str, Any]) -> None:
    assert len(list(saved.glob("*.safetensors"))) > 3
    loaded, report = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True, **options)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    for tensor in (*loaded.parameters(), *loaded.buffers()):
        assert tensor.device.type == "cpu"
        assert torch.isfinite(tensor).all()
    assert loaded.state_dict().keys() == hybrid.state_dict().keys()
    expected = dict(hybrid.named_buffers())
    assert all(torch.equal(buffer, expected[name]) for name, buffer in loaded.named_buffers())
    assert tied(loaded) == hybrid.config.tie_word_embeddings
    assert torch.equal(loaded(tokens(2, 20)).logits, hybrid(tokens(2, 20)).logits)


@torch.no_grad()
def test_bfloat16_survives_another_save(saved: Path, tmp_path: Path) -> None:
    first = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    assert {p.dtype for m in first.mixers().values() for p in m.parameters()} == {torch.bfloat16}
    logits = first(tokens(2, 20)).logits
    assert torch.isfinite(logits).all()
    first.save_pretrained(tmp_path)
    second = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert second.dtype == torch.bfloat16
    assert torch.equal(second(tokens(2, 20)).logits, logits)


@torch.no_grad()
def test_a_resized_vocabulary_is_saved_and_loaded(hybrid: Any, saved: Path, tmp_path: Path) -> None:
    student = AutoModelForCausalLM.from_pretrained(saved)
    student.resize_token_embeddings(270, mean_resizing=False)
    before = student(tokens(2, 12)).logits
    assert before.shape[-1] == 270
    assert torch.equal(before[..., :260], hybrid(tokens(2, 12)).logits)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.vocab_size == 270
    assert tied(loaded) == hybrid.config.tie_word_embeddings
    assert torch.equal(loaded(tokens(2, 12)).logits, before)


@torch.no_grad()
@pytest.mark.parametrize("kind", [*KINDS, "windowed_mamba2", "mamba2_heads", WINDOWED_HEADS])
def test_layers_may_stay_on_disk(kind: str, tmp_path: Path) -> None:
    hybrid, x = some_layers("llama", kind), tokens(1, 20)
    hybrid.save_pretrained(tmp_path / "model")
    places = dict.fromkeys(("lm_head", "model.embed_tokens", "model.norm", "model.rotary_emb"), "cpu")
    places |= {f"model.layers.{i}": "disk" if i in (1, 3) else "cpu" for i in range(4)}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded"
    )
    assert any(p.device.type == "meta" for p in loaded.mixers()[1].parameters())
    assert close(loaded(x).logits, hybrid(x).logits)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(loaded.generate(x, **options), hybrid.generate(x, **options))
