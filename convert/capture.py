"""A teacher's layers, walked one at a time: what enters and leaves each mixer, for any family, without patched models.

B batch, L length, D model width, H query heads, G key/value heads, P head width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .families import FamilySpec

CAPTURE = "ssmorph_capture"


class Attended(NamedTuple):
    """Queries and keys as the attention saw them (after RoPE), and the scale of their product."""

    q_BHLP: Tensor
    k_BGLP: Tensor
    scale: float


class MixerCall(NamedTuple):
    """One call of an attention layer: what enters, what reaches the output projection, what leaves; q, k if asked."""

    input_BLD: Tensor
    heads_BLE: Tensor
    output_BLD: Tensor
    attended: Attended | None


class _Stop(Exception):
    """Ends a forward once the wanted layer was reached."""


def layer_kwargs(model: nn.Module, spec: FamilySpec, tokens_BL: Tensor) -> list[dict[str, Any]]:
    """The keyword arguments every decoder layer gets for windows of this shape: masks, RoPE, no hidden states."""
    layers = spec.decoder_layers(model)
    seen: list[dict[str, Any]] = [{} for _ in layers]

    def keep(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple, kwargs: dict[str, Any]) -> None:
            seen[index] = {
                k: v for k, v in kwargs.items() if k not in ("hidden_states", "past_key_values", "use_cache")
            }

        return hook

    handles = [layer.register_forward_pre_hook(keep(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        with torch.no_grad():
            model(tokens_BL, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def first_hidden(model: nn.Module, spec: FamilySpec, tokens_BL: Tensor) -> Tensor:
    """What enters the first decoder layer: the embeddings, scaled as the family does."""
    caught: list[Tensor] = []

    def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        caught.append(args[0] if args else kwargs["hidden_states"])
        raise _Stop

    handle = spec.decoder_layers(model)[0].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad(), contextlib.suppress(_Stop):
            model(tokens_BL, use_cache=False)
    finally:
        handle.remove()
    return caught[0]


def run_layer(layer: nn.Module, hidden_BLD: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """One decoder layer; [B, L, D] to [B, L, D]."""
    out = layer(hidden_BLD, **kwargs)
    return out[0] if isinstance(out, tuple) else out


@contextlib.contextmanager
def captured(model: nn.Module, spec: FamilySpec, layers: list[int], attention: bool) -> Iterator[dict[int, MixerCall]]:
    """While open, every forward leaves the mixer calls of `layers` in the yielded dict."""
    calls: dict[int, MixerCall] = {}
    attended: dict[int, Attended] = {}
    heads: dict[int, Tensor] = {}

    def keep_heads(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple) -> None:
            heads[index] = args[0]

        return hook

    def keep(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            entered = args[0] if args else kwargs["hidden_states"]
            left = output[0] if isinstance(output, tuple) else output
            calls[index] = MixerCall(entered, heads.pop(index), left, attended.pop(index, None))

        return hook

    blocks = spec.decoder_layers(model)
    mixers = {i: blocks[i].get_submodule(spec.mixer) for i in layers}
    handles = [mixer.register_forward_hook(keep(i), with_kwargs=True) for i, mixer in mixers.items()]
    handles += [m.get_submodule(spec.out).register_forward_pre_hook(keep_heads(i)) for i, m in mixers.items()]
    try:
        with (
            _attention_tap(model, {id(m): i for i, m in mixers.items()}, attended)
            if attention
            else contextlib.nullcontext()
        ):
            yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _attention_tap(model: Any, wanted: dict[int, int], store: dict[int, Attended]) -> Iterator[None]:
    config = model.config
    before = config._attn_implementation
    inner = ALL_ATTENTION_FUNCTIONS[before] if before in ALL_ATTENTION_FUNCTIONS else ALL_ATTENTION_FUNCTIONS["sdpa"]

    def tap(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        if id(module) in wanted:
            scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
            store[wanted[id(module)]] = Attended(query.detach(), key.detach(), float(scale))
        return inner(module, query, key, value, mask, **kwargs)

    # without the second registration padding and windows would be silently ignored
    AttentionInterface.register(CAPTURE, tap)
    AttentionMaskInterface.register(CAPTURE, ALL_MASK_ATTENTION_FUNCTIONS["sdpa" if before == "sdpa" else "eager"])
    config._attn_implementation = CAPTURE
    try:
        yield
    finally:
        config._attn_implementation = before


def attention_rows(a: Attended, rows: int = 64) -> Iterator[tuple[int, Tensor]]:
    """Blocks of rows of the causal attention matrix: (first row, [B, H, rows, L']), so that no L x L matrix exists."""
    heads, length = a.q_BHLP.shape[1], a.q_BHLP.shape[2]
    k_BHLP = a.k_BGLP.repeat_interleave(heads // a.k_BGLP.shape[1], dim=1)
    for start in range(0, length, rows):
        end = min(start + rows, length)
        scores = a.scale * (a.q_BHLP[:, :, start:end] @ k_BHLP[:, :, :end].transpose(-1, -2))
        hidden = torch.ones(end - start, end, dtype=torch.bool, device=scores.device).triu(start + 1)
        yield start, F.softmax(scores.masked_fill(hidden, float("-inf")).float(), dim=-1)
