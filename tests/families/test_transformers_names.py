"""What transformers and its tools set and call by name: mended after its own test suite had failed on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationMixin

from ssmorph.convert.modeling import SsmorphConfig, SsmorphForCausalLM, hybrid_class
from tests.families.tiny import family_teacher
from tests.models import tiny_hybrid


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


def test_the_old_key_of_checkpointing(config: Any) -> None:
    config.gradient_checkpointing = True
    assert SsmorphForCausalLM(config).is_activation_checkpointing


def test_a_teachers_folder_is_no_hybrid(tmp_path: Path) -> None:
    family_teacher("qwen2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config.model_type: must be ssmorph; got .*qwen2.* Load it with AutoModel"):
        SsmorphForCausalLM.from_pretrained(tmp_path)
