"""The model families by `model_type`. A family is a FamilySpec; adding one takes one file and one row here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import fail
from .falcon import FALCON
from .gemma import GEMMA2, GEMMA3
from .gpt_neox import GPT_NEOX
from .granite import GRANITE
from .llama import LLAMA
from .mistral import MISTRAL
from .olmo2 import OLMO2
from .phi import PHI
from .phi3 import PHI3
from .probe import probe
from .qwen2 import QWEN2
from .qwen3 import QWEN3
from .refuse import refusal
from .smollm3 import SMOLLM3
from .spec import AttentionShape, FamilySpec
from .stablelm import STABLELM

SPECS = (LLAMA, MISTRAL, QWEN2, QWEN3, PHI, PHI3, GEMMA2, GEMMA3, OLMO2, SMOLLM3, GPT_NEOX, FALCON, GRANITE, STABLELM)
FAMILIES: dict[str, FamilySpec] = {word: spec for spec in SPECS for word in spec.model_types}

__all__ = ["FAMILIES", "AttentionShape", "FamilySpec", "attention_shape", "family_of", "logits_of"]


def family_of(config: Any) -> FamilySpec:
    """The family of a teacher's config.

    Raises:
        ValueError: a family that is not supported, or a config of a family that cannot be converted.
    """
    refused = refusal(config)
    if refused is not None:
        key, rule, got, do = refused
        raise fail(f"teacher.config.{key}", rule, got, do)
    if config.model_type not in FAMILIES:
        return probe(config)
    return FAMILIES[config.model_type]


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """Logits [..., V], float32, of last hidden states [..., D]: with the factor and soft cap of the model's family.

    Raises:
        ValueError: as `family_of`.
    """
    config = model.config.get_text_config()
    scale, softcap = family_of(config).logits(config)
    logits = scale * model.get_output_embeddings()(hidden).float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def attention_shape(config: Any) -> AttentionShape:
    """Head geometry of a teacher's config.

    Raises:
        ValueError: as `family_of`, and head counts that do not divide.
    """
    return family_of(config).shape(config)
