"""The student mixers by name."""

from __future__ import annotations

from collections.abc import Callable

from ...errors import fail, nearest
from .base import Mixer, MixerShape, ScanInputs
from .discrete_mamba2 import DiscreteMamba2Mixer
from .mamba2 import Mamba2Mixer

MIXERS: dict[str, Callable[[MixerShape, int], Mixer]] = {m.kind: m for m in (Mamba2Mixer, DiscreteMamba2Mixer)}

__all__ = ["MIXERS", "Mixer", "MixerShape", "ScanInputs", "make_mixer"]


def make_mixer(kind: str, shape: MixerShape, layer: int) -> Mixer:
    """A new mixer of the class registered as `kind`.

    Raises:
        ValueError: no mixer has that name.
    """
    if kind not in MIXERS:
        raise fail("student.mixer", "must be a registered mixer", repr(kind), nearest(kind, MIXERS))
    return MIXERS[kind](shape, layer)
