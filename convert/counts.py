"""Parameters of teacher and hybrid, counted on a model that its config builds on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .families import FamilySpec
from .families.spec import first_of
from .mixers import MIXERS, MixerShape, RestMixer, State

# how configs call the experts of a layer
EXPERTS = ("num_local_experts", "num_experts")


@dataclass(frozen=True, kw_only=True)
class TeacherCounts:
    """Parameters of a teacher.

    Attributes:
        total: all of them, a tied table once.
        attention: of each layer's attention module, norms of queries and keys included.
        layers: of all decoder layers together.
        active: of all decoder layers, those that one token passes: all but the experts it is not sent to.
        head: that make the logits, whether or not the embeddings are the same table.
    """

    total: int
    attention: tuple[int, ...]
    layers: int
    active: int
    head: int


def teacher_counts(config: Any, spec: FamilySpec, trust_remote_code: bool = False) -> TeacherCounts:
    """Counts of the model that a config describes."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    layers = spec.decoder_layers(model)
    share = expert_share(config)
    active = sum(p.numel() * (share if _of_expert(name, p) else 1) for name, p in layers.named_parameters())
    return TeacherCounts(
        total=parameters(model),
        attention=tuple(parameters(spec.attention(model, i)) for i in range(len(layers))),
        layers=parameters(layers),
        active=round(active),
        head=parameters(model.get_output_embeddings()),
    )


def mixer_parameters(kind: str, shape: MixerShape, attention: int, head: int = 0) -> int:
    """Parameters of one mixer; those of a layer's attention count where the mixer keeps it.

    Args:
        attention: parameters of that attention.
        head: of them, those of one head's rows that are left out with a head (`head_parameters`).
    """
    with torch.device("meta"):
        if shape.window:
            part = shape.beside()
            return attention + (parameters(State(part)) if part.state and part.groups else 0)
        if shape.kept:
            beside = shape.beside()
            left_out = beside.heads + 2 * (shape.groups - len(shape.kept_groups()))
            return attention - left_out * head + (parameters(RestMixer(beside, 0)) if beside.heads else 0)
        return parameters(MIXERS[kind](shape, 0))


def head_parameters(spec: FamilySpec, config: Any) -> int:
    """Parameters of one head's rows in a query, key or value projection; 0 where attention keeps the rows of all."""
    shape = spec.shape(config)
    return shape.head_dim * (shape.hidden + shape.qkv_bias) if spec.head_rows() else 0


def parameters(module: nn.Module) -> int:
    """Parameters of a module, shared ones once."""
    return sum(p.numel() for p in module.parameters())


def experts(config: Any) -> int | None:
    """Experts of a layer; None for a model without."""
    return first_of(config, *EXPERTS) or None


def expert_share(config: Any) -> float:
    """Share of a layer's experts that one token is sent to; all of them where the config does not say."""
    every = experts(config)
    return 1.0 if every is None else first_of(config, "num_experts_per_tok", default=every) / every


def _of_expert(name: str, parameter: nn.Parameter) -> bool:
    # the experts of a layer are a list of MLPs, or their matrices are stacked
    return ".experts." in name or parameter.dim() == 3
