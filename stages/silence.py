"""Hybrids with a part taken away, to see who does the work: the states, or only some of the converted layers.

B batch, L length, D model width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ssmorph.convert.families import FamilySpec
from ssmorph.convert.mixers import AttendingMixer, HeadsMixer, Mixer, ScanMixer, WindowedMixer

# a decay whose exponential is 0 in float32: nothing of the state outlives a token
FORGET = -110.0


@contextlib.contextmanager
def silenced(hybrid: Any) -> Iterator[None]:
    """While open, converted layers see the present token alone: state and convolution cache are 0 at every token.

    Every token becomes a document of its own, which mixers already know how to keep apart. A mixer around attention, a
    window or a few heads of it, keeps that: only its state forgets.
    """

    def part(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        hidden_BLD = args[0] if args else kwargs["hidden_states"]
        starts_BL = torch.zeros(hidden_BLD.shape[:2], dtype=torch.long, device=hidden_BLD.device)
        return args, {**kwargs, "position_ids": starts_BL}

    with contextlib.ExitStack() as stack:
        for mixer in hybrid.mixers().values():
            if not isinstance(mixer, AttendingMixer):
                handle = mixer.register_forward_pre_hook(part, with_kwargs=True)
                stack.callback(handle.remove)
            else:
                stack.enter_context(stateless(mixer))
        yield


def has_state(mixer: Mixer) -> bool:
    """Whether there is a recurrent state at all: a window may have none, and every head may be kept."""
    if isinstance(mixer, WindowedMixer):
        return mixer.state is not None
    return not isinstance(mixer, HeadsMixer) or mixer.scan is not None


@contextlib.contextmanager
def stateless(mixer: Mixer) -> Iterator[None]:
    """While open, a state holds the present token alone, and one behind a window says nothing; the rest works on."""
    if isinstance(mixer, WindowedMixer):
        with _shut(mixer):
            yield
        return
    if isinstance(mixer, HeadsMixer):
        with contextlib.nullcontext() if mixer.scan is None else stateless(mixer.scan):
            yield
        return
    assert isinstance(mixer, ScanMixer)
    decay = mixer._decay

    def forgetful(decay_BLH: Tensor) -> tuple[Tensor, Tensor | None]:
        log_a_BLH, w_BLH = decay(decay_BLH)
        return torch.full_like(log_a_BLH, FORGET), w_BLH

    mixer._decay = forgetful  # type: ignore[method-assign]
    try:
        yield
    finally:
        del mixer._decay


@contextlib.contextmanager
def _shut(mixer: WindowedMixer) -> Iterator[None]:
    if mixer.state is None:
        yield
        return
    gate_H = mixer.state.gate.detach().clone()
    mixer.state.gate.data.zero_()
    try:
        yield
    finally:
        mixer.state.gate.data.copy_(gate_H)


@contextlib.contextmanager
def restored(hybrid: Any, teacher: Any, spec: FamilySpec, layers: list[int]) -> Iterator[None]:
    """While open, `layers` of the hybrid have the teacher's attention again."""
    taught = spec.decoder_layers(teacher)
    with replaced(hybrid, spec, {i: taught[i].get_submodule(spec.mixer) for i in layers}):
        yield


@contextlib.contextmanager
def replaced(model: Any, spec: FamilySpec, mixers: Mapping[int, nn.Module]) -> Iterator[None]:
    """While open, `mixers` stand in the places of these layers' attentions or mixers."""
    layers = spec.decoder_layers(model)
    path, _, name = spec.mixer.rpartition(".")
    before = {i: layers[i].get_submodule(spec.mixer) for i in mixers}
    try:
        for i, mixer in mixers.items():
            setattr(layers[i].get_submodule(path), name, mixer)
        yield
    finally:
        for i, mixer in before.items():
            setattr(layers[i].get_submodule(path), name, mixer)


def own_window(mixer: Mixer) -> tuple[int, int] | None:
    """(tokens, sinks) of the attention that a mixer keeps beside its state; None for one without."""
    shape = mixer.shape
    return (shape.window - shape.sinks, shape.sinks) if shape.window else None
