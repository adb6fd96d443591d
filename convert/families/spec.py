"""What conversion must know of a model family, as data: where the mixers are, how their projections are called.

B batch, L length, D model width, H query heads, G key/value heads, P head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import fail


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Head geometry of a teacher, the same in all layers, from its config alone."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    qkv_bias: bool
    out_bias: bool
    eps: float


class Projection(NamedTuple):
    """Rows of one projection, (out, in), and their bias."""

    weight: Tensor
    bias: Tensor | None


class Projections(NamedTuple):
    """Queries [H*P, D], keys and values [G*P, D], as the linear layers make them: before norms, RoPE and scale."""

    query: Projection
    key: Projection
    value: Projection


def first_of(config: Any, *names: str, default: Any = None) -> Any:
    """The first of these attributes that the config has and that is not None."""
    return next((value for value in (getattr(config, name, None) for name in names) if value is not None), default)


def head_width(config: Any) -> int:
    """Width of a query head."""
    return int(first_of(config, "head_dim", default=config.hidden_size // config.num_attention_heads))


def sliding_window(config: Any, layer: int) -> int | None:
    """Tokens that a layer sees, itself included, where its `layer_types` entry says that it slides; None for all."""
    kinds = getattr(config, "layer_types", None)
    slides = kinds is not None and kinds[layer] == "sliding_attention"
    return config.sliding_window if slides else None


def rotary_share(config: Any, layer: int) -> float:
    """Share of a head's channels that RoPE turns, 0 to 1."""
    del layer
    rope = getattr(config, "rope_parameters", None) or {}
    return float(rope.get("partial_rotary_factor", 1.0))


def attention_bias(config: Any) -> tuple[bool, bool]:
    """Whether q, k, v and whether the output projection have biases."""
    bias = bool(getattr(config, "attention_bias", False))
    return bias, bias


@dataclass(frozen=True, kw_only=True)
class FamilySpec:
    """One model family of transformers. Paths are attribute paths from the causal language model.

    The defaults are those of Llama; a family names what differs. What a checkpoint's config decides is a function of
    the config, and for what may differ between layers, of the layer's index.

    Attributes:
        model_types: the `model_type` words of its configs.
        layers: the list of decoder layers.
        mixer: the attention module of a layer.
        mixer_norm: the norm before it; None where nothing norms its input.
        query, key, value, out: projections of the attention module.
        fused: instead of query, key and value, the one projection that makes all three.
        fused_order: its rows: 'blocks' are all queries, all keys, all values; 'groups' are for each key/value head its
            queries, its key, its value.
        query_norm, key_norm: norms of queries and keys before RoPE, of each head or over all of them.
        unit_offset: these norms multiply by 1 + weight.
        kv_heads, scale, biases: from the config.
        window: tokens that a layer sees; None for all.
        softcap: soft cap of the attention scores; None for none.
        rotary: share of channels that RoPE turns in a layer.
        rotary_halves: whether it turns channel i with i + R/2, of the first R channels, by the tables a layer gets.
        logits: factor and soft cap of the logits.
        eps: name of the norms' eps in the config.
        attention_function: whether attention goes through transformers' registered attention functions.
        fewer_heads: whether the attention also works when query, key and value have rows of some heads only: it takes
            their number from these projections, and no norm needs all of them.
        stock_export: the architecture of other software that has this family's decoder layers, if any (convert/export).
    """

    model_types: tuple[str, ...]
    layers: str = "model.layers"
    mixer: str = "self_attn"
    mixer_norm: Callable[[Any], str | None] = lambda config: "input_layernorm"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    out: str = "o_proj"
    fused: str | None = None
    fused_order: Callable[[Any], Literal["blocks", "groups"]] = lambda config: "blocks"
    query_norm: str | None = None
    key_norm: str | None = None
    unit_offset: bool = False
    kv_heads: Callable[[Any], int] = lambda config: first_of(
        config, "num_key_value_heads", default=config.num_attention_heads
    )
    scale: Callable[[Any], float] = lambda config: head_width(config) ** -0.5
    biases: Callable[[Any], tuple[bool, bool]] = attention_bias
    window: Callable[[Any, int], int | None] = sliding_window
    softcap: Callable[[Any], float | None] = lambda config: getattr(config, "attn_logit_softcapping", None)
    rotary: Callable[[Any, int], float] = rotary_share
    rotary_halves: bool = True
    logits: Callable[[Any], tuple[float, float | None]] = lambda config: (
        1.0,
        getattr(config, "final_logit_softcapping", None),
    )
    eps: str = "rms_norm_eps"
    attention_function: bool = True
    fewer_heads: bool = True
    stock_export: str | None = None

    def decoder_layers(self, model: nn.Module) -> nn.ModuleList:
        """The model's decoder layers."""
        layers = model.get_submodule(self.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def attention(self, model: nn.Module, layer: int) -> nn.Module:
        """A layer's attention module."""
        return self.decoder_layers(model)[layer].get_submodule(self.mixer)

    def head_rows(self) -> tuple[str, ...]:
        """The projections of queries, keys and values, where they may have rows of some heads only; else nothing."""
        return (self.query, self.key, self.value) if self.fewer_heads and self.fused is None else ()

    def shape(self, config: Any) -> AttentionShape:
        """Head geometry, from the config.

        Raises:
            ValueError: head counts that do not divide.
        """
        heads, kv_heads = config.num_attention_heads, self.kv_heads(config)
        if kv_heads < 1 or heads % kv_heads:
            rule = f"num_key_value_heads must divide the {heads} heads"
            raise fail("teacher.config", rule, kv_heads, "Mend the model's config.json.")
        qkv_bias, out_bias = self.biases(config)
        return AttentionShape(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_width(config),
            scale=self.scale(config),
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            eps=getattr(config, self.eps),
        )

    def turned(self, config: Any, layer: int) -> int:
        """Channels of a head that RoPE turns in a layer, where it can be taken back; 0 for none."""
        return round(self.rotary(config, layer) * self.shape(config).head_dim) if self.rotary_halves else 0

    def projections(self, attention: nn.Module, config: Any) -> Projections:
        """The three projections of an attention module, fused ones taken apart.

        Raises:
            ValueError: weights that are quantised, or of other sizes than the config says.
        """
        shape = self.shape(config)
        names = (self.query, self.key, self.value)
        rows = [heads * shape.head_dim for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
        if self.fused is None:
            parts = [linear(attention, name) for name in names]
            for name, part, wanted in zip(names, parts, rows, strict=True):
                _check_rows(name, part.weight, wanted, shape.hidden)
            return Projections(*(Projection(part.weight, part.bias) for part in parts))
        whole = linear(attention, self.fused)
        _check_rows(self.fused, whole.weight, sum(rows), shape.hidden)
        order = self.fused_order(config)
        weights = split_fused(whole.weight, shape, order)
        biases = (None, None, None) if whole.bias is None else split_fused(whole.bias, shape, order)
        return Projections(*(Projection(w, b) for w, b in zip(weights, biases, strict=True)))


def split_fused(rows: Tensor, shape: AttentionShape, order: str) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values out of fused rows [(H + 2 G) * P, ...]."""
    per_head = rows.unflatten(0, (-1, shape.head_dim))
    if order == "blocks":
        q, k, v = per_head.split([shape.heads, shape.kv_heads, shape.kv_heads])
    else:
        groups = per_head.unflatten(0, (shape.kv_heads, -1))
        q, k, v = groups[:, :-2].flatten(0, 1), groups[:, -2], groups[:, -1]
    return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)


def linear(attention: nn.Module, name: str) -> nn.Linear:
    """A projection of an attention module.

    Raises:
        ValueError: one that is not a plain linear layer with floating-point weights, as quantised ones are not.
    """
    found = attention.get_submodule(name)
    if not isinstance(found, nn.Linear) or not found.weight.is_floating_point():
        do = "Load the teacher without quantisation."
        raise fail("teacher", f"{name} must be a plain linear layer to be copied", type(found).__name__, do)
    return found


def _check_rows(name: str, weight: Tensor, rows: int, columns: int) -> None:
    if tuple(weight.shape) != (rows, columns):
        rule = f"{name} must have shape ({rows}, {columns}), as the config says"
        raise fail("teacher", rule, tuple(weight.shape), "Use the config that belongs to the weights.")


def norm_weight(norm: nn.Module, unit_offset: bool) -> Tensor:
    """What a norm multiplies by, in float64."""
    weight = norm.get_parameter("weight").double()
    return torch.add(weight, 1) if unit_offset else weight
