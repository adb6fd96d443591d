"""Falcon-7B and 40B: q, k and v fused, one key/value head or a few; its attention calls no registered function."""

from typing import Any

from .spec import FamilySpec


def _parallel_norms(config: Any) -> bool:
    return config.new_decoder_architecture and config.num_ln_in_parallel_attn != 1


def _kv_heads(config: Any) -> int:
    if config.new_decoder_architecture:
        return int(config.num_kv_heads)
    return 1 if config.multi_query else int(config.num_attention_heads)


FALCON = FamilySpec(
    model_types=("falcon",),
    layers="transformer.h",
    mixer="self_attention",
    # Falcon-40B's is called ln_attn
    mixer_norm=lambda config: "ln_attn" if _parallel_norms(config) else "input_layernorm",
    out="dense",
    fused="query_key_value",
    fused_order=lambda config: "blocks" if config.multi_query and not config.new_decoder_architecture else "groups",
    kv_heads=_kv_heads,
    biases=lambda config: (config.bias, config.bias),
    eps="layer_norm_epsilon",
    attention_function=False,
)
