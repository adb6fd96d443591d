"""The model families by `model_type`. A family is a FamilySpec; adding one takes one file and one row here."""

from __future__ import annotations

from ...errors import fail, nearest
from .llama import LLAMA
from .spec import AttentionShape, FamilySpec

FAMILIES: dict[str, FamilySpec] = {word: spec for spec in (LLAMA,) for word in spec.model_types}

__all__ = ["FAMILIES", "AttentionShape", "FamilySpec", "family_of"]


def family_of(model_type: str) -> FamilySpec:
    """The family of a config's `model_type`.

    Raises:
        ValueError: a family that is not supported.
    """
    if model_type not in FAMILIES:
        raise fail(
            "teacher.config.model_type", "must be a supported family", repr(model_type), nearest(model_type, FAMILIES)
        )
    return FAMILIES[model_type]
