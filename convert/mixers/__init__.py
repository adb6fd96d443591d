"""The student mixers by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ...errors import fail, nearest
from .attending import AttendingMixer
from .base import Mixer, MixerShape, ScanInputs, ScanMixer
from .discrete_mamba2 import DiscreteMamba2Mixer
from .heads import HeadsMixer, RestMixer
from .mamba2 import Mamba2Mixer
from .windowed import State, WindowedMixer, WindowMixer

MIXERS: dict[str, Any] = {m.kind: m for m in (Mamba2Mixer, DiscreteMamba2Mixer, WindowedMixer, WindowMixer, HeadsMixer)}

__all__ = ["MIXERS", "AttendingMixer", "HeadsMixer", "Mixer", "MixerShape", "RestMixer", "ScanInputs", "ScanMixer",
           "State", "WindowedMixer", "has_window", "keeps_attention", "make_mixer", "scan_of"]  # fmt: skip


def scan_of(mixer: Mixer) -> tuple[ScanMixer, tuple[int, ...]] | None:
    """The Mamba-2 of a mixer, and the teacher's query heads it stands for; None where it has none of that kind."""
    if isinstance(mixer, HeadsMixer):
        return None if mixer.scan is None else (mixer.scan, mixer.rest)
    return (mixer, tuple(range(mixer.shape.heads))) if isinstance(mixer, ScanMixer) else None


def has_window(kind: str) -> bool:
    """Whether mixers of this kind keep the attention inside a window."""
    return kind in MIXERS and issubclass(MIXERS[kind], WindowedMixer)


def keeps_attention(kind: str) -> bool:
    """Whether mixers of this kind are made around the layer's own attention."""
    return kind in MIXERS and issubclass(MIXERS[kind], AttendingMixer)


def make_mixer(
    kind: str, shape: MixerShape, layer: int, attention: nn.Module, out: str, rows: Sequence[str] = ()
) -> Mixer:
    """A new mixer of the class registered as `kind`.

    Args:
        attention: the layer's own attention, which a mixer that keeps attention takes in; the others do without.
        out: the name of its output projection.
        rows: names of its query, key and value projections, where these may have rows of some heads only.

    Raises:
        ValueError: no mixer has that name.
    """
    if kind not in MIXERS:
        raise fail("student.mixer", "must be a registered mixer", repr(kind), nearest(kind, MIXERS))
    made = MIXERS[kind]
    if issubclass(made, HeadsMixer):
        mixer = made(shape, layer, attention, out, rows)
    elif issubclass(made, AttendingMixer):
        mixer = made(shape, layer, attention, out)
    else:
        mixer = made(shape, layer)
    assert isinstance(mixer, Mixer)
    return mixer
