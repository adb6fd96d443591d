"""What conversion must know of a model family, as data: where the mixers are and how their projections are called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ...errors import fail


@dataclass(frozen=True, kw_only=True)
class FamilySpec:
    """One model family of transformers. Paths are attribute paths from the causal language model.

    Attributes:
        model_types: the `model_type` words of its configs.
        layers: the list of decoder layers.
        mixer, mixer_norm: the attention module of a layer and the norm before it.
        query, key, value, out: projections of the attention module.
        final_norm, head: what turns the last hidden state into logits.
        stock_export: the stock architecture a `mamba2` hybrid of this family can be written as, if any.
    """

    model_types: tuple[str, ...]
    layers: str = "model.layers"
    mixer: str = "self_attn"
    mixer_norm: str = "input_layernorm"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    out: str = "o_proj"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    stock_export: str | None = None

    def decoder_layers(self, model: nn.Module) -> nn.ModuleList:
        """The model's decoder layers."""
        layers = model.get_submodule(self.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Head geometry of a teacher, from its config alone."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    qkv_bias: bool
    out_bias: bool
    eps: float

    @classmethod
    def of(cls, config: Any) -> AttentionShape:
        """Reads a transformers config.

        Raises:
            ValueError: head counts that do not divide.
        """
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        if heads % kv_heads:
            raise fail(
                "teacher.config",
                f"num_key_value_heads must divide the {heads} heads",
                kv_heads,
                "Mend the model's config.json.",
            )
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        bias = bool(getattr(config, "attention_bias", False))
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            qkv_bias=bias,
            out_bias=bias,
            eps=config.rms_norm_eps,
        )
