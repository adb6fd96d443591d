"""What transformers and its tools set and call by name: mended after its own test suite had failed on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationMixin

import ssmorph.hf  # noqa: F401  registers the classes
from ssmorph.convert.modeling import SsmorphConfig, SsmorphForCausalLM, hybrid_class
from tests.families.tiny import family_teacher
from tests.models import tiny_hybrid, tiny_teacher


@pytest.fixture
def config() -> Any:
    return tiny_hybrid().config


def test_weights_may_come_without_a_folder() -> None:
    hybrid = tiny_hybrid()
    for target in (SsmorphForCausalLM, hybrid_class(hybrid.config)):
        loaded = target.from_pretrained(
            pretrained_model_name_or_path=None, config=hybrid.config, state_dict=hybrid.state_dict()
        )
        assert all(torch.equal(own, loaded.state_dict()[name]) for name, own in hybrid.state_dict().items())


def test_classes_say_what_they_can(config: Any) -> None:
    assert SsmorphForCausalLM.can_generate()
    assert GenerationMixin in hybrid_class(config).__bases__
    assert hybrid_class(config).teacher_class._can_compile_fullgraph
    assert not hybrid_class(config)._can_compile_fullgraph


def test_a_changed_vocabulary_reaches_the_model(config: Any) -> None:
    config.vocab_size, config.pad_token_id = 40, 3
    embeddings = SsmorphForCausalLM(config).get_input_embeddings()
    assert (embeddings.num_embeddings, embeddings.padding_idx) == (40, 3)


def test_what_both_configs_say_is_changed_in_both(config: Any, tmp_path: Path) -> None:
    config.tie_word_embeddings, config.eos_token_id = False, 7
    config.save_pretrained(tmp_path)
    loaded = SsmorphConfig.from_pretrained(tmp_path)
    assert (loaded.text_config.tie_word_embeddings, loaded.text_config.eos_token_id) == (False, 7)
    model = SsmorphForCausalLM(loaded)
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight


ROPE = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}


def said(model: Any) -> list[Any]:
    """What a model makes of its config."""
    out = model(torch.arange(9)[None])
    found = [out.past_key_values is None, out.hidden_states is not None, out.attentions is not None]
    attention = model.get_submodule("model.layers.0.self_attn")
    return [*found, attention.attention_dropout, model.get_submodule("model.rotary_emb").rope_type]


def test_a_changed_config_is_heeded_as_by_the_teacher() -> None:
    found = []
    for model in (tiny_teacher(), tiny_hybrid()):
        model.set_attn_implementation("eager")
        model.config.use_cache, model.config.output_hidden_states, model.config.output_attentions = False, True, True
        found.append(said(model))
    assert found[1] == found[0] == [True, True, True, 0.0, "default"]


@pytest.mark.parametrize("loader", [AutoModelForCausalLM, SsmorphForCausalLM])
def test_keywords_for_the_config_are_heeded_as_by_the_teacher(loader: Any, tmp_path: Path) -> None:
    hybrid = tiny_hybrid()
    hybrid.save_pretrained(tmp_path / "a")
    options = {"use_cache": False, "output_hidden_states": True, "output_attentions": True, "attention_dropout": 0.5}
    options |= {"attn_implementation": "eager", "rope_parameters": dict(ROPE), "dtype": torch.bfloat16}
    loaded = loader.from_pretrained(tmp_path / "a", **options)
    assert loaded.dtype == torch.bfloat16
    assert said(loaded) == [True, True, True, 0.5, "linear"]
    loaded.save_pretrained(tmp_path / "b")
    again = loader.from_pretrained(tmp_path / "b", attn_implementation="eager")
    assert said(again) == said(loaded)
    assert again.config.attention_dropout == 0.5
    assert again.config.text_config.rope_parameters == ROPE
    assert SsmorphConfig.from_dict(loaded.config.to_dict()).to_dict() == loaded.config.to_dict()
    assert said(loader.from_pretrained(tmp_path / "a")) == said(hybrid) == [False, False, False, 0.0, "default"]


def test_each_config_says_its_own(config: Any, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    tree = json.loads((tmp_path / "config.json").read_text())
    shared = {"tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"}
    own = {"auto_map", "converted", "dtype", "model_type", "places", "ssmorph_version", "transformers_version"}
    assert set(tree) - {"architectures"} == own | shared | {"text_config"}
    config.architectures, config.dtype = ["Own"], torch.float16
    assert config.text_config.architectures != ["Own"]
    assert config.text_config.dtype != torch.float16
    config.dtype = torch.float32
    config.return_dict = False
    assert isinstance(SsmorphForCausalLM(config)(torch.arange(9)[None]), tuple)
    config.teacherless = 1
    assert not hasattr(config.text_config, "teacherless")


def test_the_old_key_of_checkpointing(config: Any) -> None:
    config.gradient_checkpointing = True
    assert SsmorphForCausalLM(config).is_activation_checkpointing


def test_a_teachers_folder_is_no_hybrid(tmp_path: Path) -> None:
    family_teacher("qwen2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config.model_type: must be ssmorph; got .*qwen2.* Load it with AutoModel"):
        SsmorphForCausalLM.from_pretrained(tmp_path)
