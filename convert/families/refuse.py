"""What no family can convert, read from the config alone: each refusal names what stands in the way and the way out."""

from __future__ import annotations

from typing import Any, NamedTuple

ATTENTION = frozenset({"attention", "full_attention", "sliding_attention"})


class Refusal(NamedTuple):
    """The config key that decides, and the rest of the error."""

    key: str
    rule: str
    got: object
    do: str


def refusal(config: Any) -> Refusal | None:
    """Why a config of whatever family cannot be converted; None where nothing here stands in the way."""
    return _other_model(config) or _other_weights(config) or _other_layers(config)


def _other_model(config: Any) -> Refusal | None:
    if getattr(config, "is_encoder_decoder", False):
        rule = "the teacher must be a decoder alone, without an encoder"
        return Refusal("is_encoder_decoder", rule, config.model_type, "Choose a causal language model.")
    for key in ("vision_config", "audio_config", "text_config"):
        if getattr(config, key, None) is not None:
            rule = "the teacher must be a text model, not a wrapper around one"
            do = "Save the text model alone with transformers, and convert that."
            return Refusal(key, rule, config.model_type, do)
    crosses = any(getattr(config, key, None) for key in ("add_cross_attention", "cross_attention_layers"))
    if crosses:
        rule = "the teacher's layers must attend to their own tokens only"
        return Refusal("cross_attention", rule, "cross-attention", "Choose a model without it.")
    return None


def _other_weights(config: Any) -> Refusal | None:
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    rule = "the weights must be floating-point: quantised ones can be neither copied nor trained"
    method = getattr(method, "value", method) or "quantised weights"
    return Refusal("quantization_config", rule, method, "Load the model dequantised, save it, and convert that.")


def _other_layers(config: Any) -> Refusal | None:
    if getattr(config, "kv_lora_rank", None):
        rule = "keys and values must be projections of the layer's input, not of a shared latent (MLA)"
        return Refusal("kv_lora_rank", rule, config.kv_lora_rank, "Choose a model with ordinary attention.")
    for key in ("layer_types", "layers_block_type"):
        others = sorted(set(getattr(config, key, None) or ()) - ATTENTION)
        if others:
            rule = "every layer must be softmax attention, full or sliding"
            return Refusal(key, rule, ", ".join(others), "Choose a model that is no hybrid yet.")
    if getattr(config, "alibi", False):
        return Refusal("alibi", "positions must come from RoPE", "alibi", "Choose a model with RoPE.")
    if getattr(config, "use_bidirectional_attention", None):
        rule = "attention must be causal, as a state is"
        return Refusal("use_bidirectional_attention", rule, "bidirectional", "Convert a decoder, not an encoder.")
    return None
