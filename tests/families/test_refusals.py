"""Configs that cannot be converted are refused by name before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from ssmorph.convert.families import family_of
from ssmorph.convert.surgery import copy_attention
from ssmorph.convert.teachers import load_config
from tests.families.tiny import family_config, family_teacher

QUANTISED = {"quantization_config": {"quant_method": "gptq", "bits": 4}}

# (config, where, rule, got, do)
REFUSED: dict[str, tuple[Any, str, str, str, str]] = {
    "encoder-decoder": (("t5", {}), "is_encoder_decoder", "without an encoder", "t5", "causal language model"),
    "gemma3": (("gemma3", {}), "vision_config", "must be a text model", "gemma3", "Save the text model alone"),
    "qwen2_vl": (("qwen2_vl", {}), "vision_config", "must be a text model", "qwen2_vl", "Save the text model alone"),
    "quantised": (("llama", QUANTISED), "quantization_config", "must be floating-point", "gptq", "dequantised"),
    "mla": (("deepseek_v3", {}), "kv_lora_rank", "shared latent", "512", "ordinary attention"),
    "jamba": (("jamba", {}), "layer_types", "softmax attention", "linear_attention", "no hybrid yet"),
    "mamba": (("mamba", {}), "layer_types", "softmax attention", "linear_attention", "no hybrid yet"),
    "recurrent": (("recurrent_gemma", {}), "layer_types", "softmax attention", "linear_attention", "no hybrid yet"),
    "cross": (
        ("gpt2", {"add_cross_attention": True}),
        "cross_attention",
        "own tokens only",
        "cross-attention",
        "Choose",
    ),
    "alibi": (("falcon", {"alibi": True}), "alibi", "must come from RoPE", "alibi", "Choose a model with RoPE"),
    "bidirectional": (
        ("gemma3_text", {"use_bidirectional_attention": True}),
        "use_bidirectional_attention",
        "must be causal",
        "bidirectional",
        "Convert a decoder",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_config_that_cannot_be_converted(case: str) -> None:
    (model_type, changes), where, rule, got, do = REFUSED[case]
    with pytest.raises(ValueError, match="teacher") as caught:
        family_of(AutoConfig.for_model(model_type, **changes))
    place, _, rest = str(caught.value).partition(": ")
    assert place == f"teacher.config.{where}"
    assert rule in rest.partition("; got ")[0]
    assert got in rest.partition("; got ")[2].partition(". ")[0]
    assert do in rest.partition("; got ")[2].partition(". ")[2]


def test_no_weights_are_needed_to_refuse(tmp_path: Path) -> None:
    tree = {**family_config("llama").to_dict(), **QUANTISED}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match="quantization_config"):
        load_config(str(tmp_path))


@pytest.mark.parametrize(("row", "name"), [("qwen3", "k_proj"), ("gpt_neox", "query_key_value")])
def test_weights_that_contradict_the_config(row: str, name: str) -> None:
    teacher = family_teacher(row)
    spec = family_of(teacher.config)
    linear = spec.attention(teacher, 1).get_submodule(name)
    assert isinstance(linear, torch.nn.Linear)
    linear.weight = torch.nn.Parameter(linear.weight[:-12])
    with pytest.raises(ValueError, match=rf"{name} must have shape .*as the config says; got .* Use the config"):
        copy_attention(teacher, spec, 1, "mamba2")
