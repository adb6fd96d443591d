"""A tiny random model of every family: one row each, as the family's own config class takes it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ssmorph.convert.tiny import strengthen

COMMON = {
    "vocab_size": 260, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 6,
    "max_position_embeddings": 512, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
}  # fmt: skip
GQA = {**COMMON, "num_key_value_heads": 2}
WIDE = {**GQA, "head_dim": 12}
HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
EXPERTS = {"num_experts_per_tok": 2}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip

# row -> (model_type, its config)
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**GQA, "tie_word_embeddings": True}),
    "llama3": ("llama", {**GQA, "rope_parameters": LLAMA3, "attention_bias": True}),
    "mistral": ("mistral", {**WIDE, "sliding_window": 7}),
    "mixtral": ("mixtral", {**GQA, **EXPERTS, "num_local_experts": 3, "sliding_window": None}),
    "qwen2": ("qwen2", {**GQA, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}),
    "qwen3": ("qwen3", WIDE),
    "qwen3_moe": ("qwen3_moe", {**WIDE, **EXPERTS, "num_experts": 3, "moe_intermediate_size": 32}),
    "phi": (
        "phi",
        {**GQA, "rope_parameters": HALF},
    ),
    "phi-normed": ("phi", {**COMMON, "qk_layernorm": True}),
    "phi3": ("phi3", {**GQA, "sliding_window": 7}),
    "gemma2": ("gemma2", {**WIDE, "query_pre_attn_scalar": 20, "sliding_window": 7}),
    "gemma3": ("gemma3_text", {**WIDE, "num_key_value_heads": 1, "query_pre_attn_scalar": 20, "sliding_window": 7}),
    "olmo2": ("olmo2", GQA),
    "smollm3": ("smollm3", GQA),
    "gpt_neox": ("gpt_neox", COMMON),
    "falcon-7b": ("falcon", {**COMMON, "multi_query": True, "bias": True}),
    "falcon-40b": ("falcon", {**COMMON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "granite": ("granite", {**GQA, "attention_multiplier": 0.2, "residual_multiplier": 0.7, "logits_scaling": 2.0}),
    "stablelm": ("stablelm", {**GQA, "use_qkv_bias": True}),
    "stablelm-normed": ("stablelm", {**GQA, "qk_layernorm": True}),
}


def family_config(row: str) -> Any:
    """The config of a row."""
    model_type, values = ROWS[row]
    return AutoConfig.for_model(model_type, **values)


def family_teacher(row: str, **options: Any) -> Any:
    """A strong random model of a row, in eval mode and frozen."""
    model = strengthen(AutoModelForCausalLM.from_config(family_config(row), **options))
    if row.startswith("gemma"):
        # embeddings are scaled up and tied: every prediction would be certain; this norm multiplies by 1 + weight
        torch.nn.init.constant_(model.get_submodule("model.norm").weight, -0.9)
    return model.eval().requires_grad_(False)
