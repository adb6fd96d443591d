"""What a hybrid has to beat, at the same layers and without training: the copy, no attention at all, and a window.

The window is the honest rival: attention over the last tokens and a few sinks, in exactly the bytes that the converted
layers take together: their states, windows, and what kept heads hold after so many tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ssmorph.convert.families import FamilySpec
from ssmorph.convert.mixers import Mixer
from ssmorph.convert.plan import cache_bytes, kept_bytes_per_token, kv_bytes_per_token

SINKS = 4


def equal_window(teacher: Any, spec: FamilySpec, mixers: Mapping[int, Mixer], context: int) -> int:
    """Tokens of keys and values, sinks included, in the bytes that all mixers hold together after `context` tokens."""
    size, held = teacher.dtype.itemsize, 0
    for layer, mixer in mixers.items():
        # what kept heads hold grows with the text, or until their own sliding window is full
        reached = min(context, spec.window(teacher.config, layer) or context)
        held += cache_bytes(mixer.shape, size) + reached * kept_bytes_per_token(mixer.shape, size)
    return held // (len(mixers) * kv_bytes_per_token(spec.shape(teacher.config), size))


@contextlib.contextmanager
def removed(model: Any, spec: FamilySpec, layers: list[int]) -> Iterator[None]:
    """While open, the attention of `layers` adds nothing."""

    def silence(_module: nn.Module, _args: tuple, output: Any) -> Any:
        return (torch.zeros_like(output[0]), *output[1:])

    with _hooks(model, spec, layers, lambda mixer: mixer.register_forward_hook(silence)):
        yield


@contextlib.contextmanager
def windowed(model: Any, spec: FamilySpec, layers: list[int], tokens: int, sinks: int = SINKS) -> Iterator[None]:
    """While open, the attention of `layers` sees its last `tokens - sinks` tokens and the first `sinks`."""
    masks: dict[tuple[int, torch.device], Tensor] = {}

    def mask(length: int, device: torch.device) -> Tensor:
        if (length, device) not in masks:
            rows, columns = torch.arange(length, device=device)[:, None], torch.arange(length, device=device)
            near = (columns <= rows) & (columns > rows - (tokens - sinks))
            masks[length, device] = (near | ((columns < sinks) & (columns <= rows)))[None, None]
        return masks[length, device]

    def narrow(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        near, given = mask(hidden.shape[1], hidden.device), kwargs.get("attention_mask")
        if given is not None and given.dtype != torch.bool:
            near = given.masked_fill(~near, torch.finfo(given.dtype).min)
        elif given is not None:
            near = given & near
        return args, {**kwargs, "attention_mask": near}

    with _hooks(model, spec, layers, lambda mixer: mixer.register_forward_pre_hook(narrow, with_kwargs=True)):
        yield


@contextlib.contextmanager
def _hooks(model: Any, spec: FamilySpec, layers: list[int], register: Any) -> Iterator[None]:
    blocks = spec.decoder_layers(model)
    handles = [register(blocks[i].get_submodule(spec.mixer)) for i in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
