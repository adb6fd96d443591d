"""The student mixers by name."""

from __future__ import annotations

from ...errors import fail, nearest
from .base import Mixer, MixerShape, ScanInputs
from .discrete_mamba2 import DiscreteMamba2Mixer
from .mamba2 import Mamba2Mixer

MIXERS: dict[str, type[Mixer]] = {mixer.kind: mixer for mixer in (Mamba2Mixer, DiscreteMamba2Mixer)}

__all__ = ["MIXERS", "Mixer", "MixerShape", "ScanInputs", "mixer_class"]


def mixer_class(kind: str) -> type[Mixer]:
    """The mixer registered as `kind`.

    Raises:
        ValueError: no mixer has that name.
    """
    if kind not in MIXERS:
        raise fail("student.mixer", "must be a registered mixer", repr(kind), nearest(kind, MIXERS))
    return MIXERS[kind]
