"""A teacher's layers, walked one at a time: what enters and leaves each mixer, for any family, without patched models.

B batch, L length, D model width, H query heads, G key/value heads, P head width.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache import padding_mask
from .families import FamilySpec
from .families.spec import split_fused

CAPTURE = "ssmorph_capture"
# of a decoder layer's arguments, what belongs to one call alone
OWN = ("hidden_states", "past_key_values", "layer_past", "use_cache")


@dataclass(frozen=True)
class Attended:
    """What an attention was made of: queries and keys after norms and RoPE, and how they become probabilities.

    Attributes:
        q_BHLP, k_BGLP: queries and keys; head h uses key head h // (H / G).
        scale: factor of the scores.
        window: tokens that a query sees, itself included; None for all.
        softcap: c in c tanh(score / c); None for none.
        sinks_H: one more logit per head, which takes probability and has no column; None for none.
        valid_BL: False at padded tokens; None where there are none.
    """

    q_BHLP: Tensor
    k_BGLP: Tensor
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks_H: Tensor | None = None
    valid_BL: Tensor | None = None

    def of(self, heads: Sequence[int]) -> Attended:
        """The same of some query heads, in that order, with a key head for each."""
        if list(heads) == list(range(self.q_BHLP.shape[1])):
            return self
        index = torch.tensor(heads, device=self.q_BHLP.device)
        groups = index // (self.q_BHLP.shape[1] // self.k_BGLP.shape[1])
        sinks_H = None if self.sinks_H is None else self.sinks_H[index]
        return replace(self, q_BHLP=self.q_BHLP[:, index], k_BGLP=self.k_BGLP[:, groups], sinks_H=sinks_H)


class MixerCall(NamedTuple):
    """One call of an attention layer: what enters, what reaches the output projection, what leaves, and how."""

    input_BLD: Tensor
    heads_BLE: Tensor
    output_BLD: Tensor
    attended: Attended | None
    kwargs: dict[str, Any] = {}  # noqa: RUF012 - a tuple's default, which nobody writes to


class _Stop(Exception):
    """Ends a forward once the wanted layer was reached."""


def layer_kwargs(model: nn.Module, spec: FamilySpec, tokens_BL: Tensor) -> list[dict[str, Any]]:
    """The keyword arguments every decoder layer gets for windows of this shape: masks, RoPE, no hidden states.

    They do not depend on what layers compute, so the first alone does, which shows what a layer returns.
    """
    layers = spec.decoder_layers(model)
    seen: list[dict[str, Any]] = [{} for _ in layers]
    others: list[tuple[Any, ...] | None] = []

    def passing(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def passed(*args: Any, **kwargs: Any) -> Any:
            seen[index] = {k: v for k, v in kwargs.items() if k not in OWN}
            hidden_BLD = args[0] if args else kwargs["hidden_states"]
            if not others:
                out = forward(*args, **kwargs)
                others.append(out[1:] if isinstance(out, tuple) else None)
            return hidden_BLD if others[0] is None else (hidden_BLD, *others[0])

        return passed

    # accelerate's offloading, for one, has set another on the layer itself
    own = [vars(layer).get("forward") for layer in layers]
    try:
        for index, layer in enumerate(layers):
            layer.forward = passing(index, layer.forward)
        with torch.no_grad():
            model(tokens_BL, use_cache=False, logits_to_keep=1)
    finally:
        for layer, forward in zip(layers, own, strict=True):
            if forward is not None:
                layer.forward = forward
            else:
                vars(layer).pop("forward", None)
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
            others = {k: v for k, v in kwargs.items() if k not in OWN}
            calls[index] = MixerCall(entered, heads.pop(index), left, attended.pop(index, None), others)

        return hook

    blocks = spec.decoder_layers(model)
    mixers = {i: blocks[i].get_submodule(spec.mixer) for i in layers}
    handles = [mixer.register_forward_hook(keep(i), with_kwargs=True) for i, mixer in mixers.items()]
    handles += [m.get_submodule(spec.out).register_forward_pre_hook(keep_heads(i)) for i, m in mixers.items()]
    try:
        with _tap(model, spec, mixers, attended) if attention else contextlib.nullcontext():
            yield calls
    finally:
        for handle in handles:
            handle.remove()


def _tap(
    model: Any, spec: FamilySpec, mixers: dict[int, nn.Module], store: dict[int, Attended]
) -> contextlib.AbstractContextManager[None]:
    """While open, every forward leaves what the attentions of `mixers` were made of in `store`."""
    if spec.attention_function:
        return _registered_tap(model, {id(m): i for i, m in mixers.items()}, store)
    return _hooked_tap(model, spec, mixers, store)


@contextlib.contextmanager
def _registered_tap(model: Any, wanted: dict[int, int], store: dict[int, Attended]) -> Iterator[None]:
    """By an attention function of our own that writes down its arguments and calls the model's."""
    config = model.config
    before = config._attn_implementation

    def tap(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        if id(module) in wanted:
            store[wanted[id(module)]] = _attended(module, query, key, mask, kwargs)
        # an eager attention is the family's own: only it knows of its soft caps and sinks
        eager = sys.modules[type(module).__module__].eager_attention_forward
        inner = ALL_ATTENTION_FUNCTIONS.get_interface(before, eager)
        return inner(module, query, key, value, mask, **kwargs)

    # without the second registration padding and windows would be silently ignored
    AttentionInterface.register(CAPTURE, tap)
    AttentionMaskInterface.register(CAPTURE, ALL_MASK_ATTENTION_FUNCTIONS["sdpa" if before == "sdpa" else "eager"])
    config._attn_implementation = CAPTURE
    try:
        yield
    finally:
        config._attn_implementation = before


def _attended(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> Attended:
    scale, sinks = kwargs.get("scaling"), kwargs.get("s_aux")
    return Attended(
        query.detach(),
        key.detach(),
        float(query.shape[-1] ** -0.5 if scale is None else scale),
        window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
        sinks_H=None if sinks is None else sinks.detach(),
        valid_BL=_padding(mask, query.shape[2]),
    )


def _padding(mask: Tensor | None, length: int) -> Tensor | None:
    """Which tokens are real, [B, L]; None where all are."""
    valid_BL = padding_mask(mask, length)
    return None if valid_BL is None or bool(valid_BL.all()) else valid_BL


@contextlib.contextmanager
def _hooked_tap(
    model: Any, spec: FamilySpec, mixers: dict[int, nn.Module], store: dict[int, Attended]
) -> Iterator[None]:
    """For attentions that call no registered function: from the fused projection's output and the layer's RoPE."""
    assert spec.fused is not None, "a family without attention functions is read from its fused projection"
    shape, order = spec.shape(model.config), spec.fused_order(model.config)
    arguments: dict[int, dict[str, Any]] = {}

    def before(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple, kwargs: dict[str, Any]) -> None:
            arguments[index] = kwargs

        return hook

    def after(index: int) -> Callable[..., None]:
        rotate = sys.modules[type(mixers[index]).__module__].apply_rotary_pos_emb

        def hook(_module: nn.Module, _args: tuple, output: Tensor) -> None:
            given, (batch, length) = arguments.pop(index), output.shape[:2]
            rows = split_fused(output.detach().flatten(0, 1).t(), shape, order)[:2]
            q, k = (t.t().reshape(batch, length, -1, shape.head_dim).transpose(1, 2) for t in rows)
            q, k = rotate(q, k, *given["position_embeddings"])
            valid_BL = _padding(given.get("attention_mask"), length)
            store[index] = Attended(
                q, k, shape.scale, spec.window(model.config, index), spec.softcap(model.config), valid_BL=valid_BL
            )

        return hook

    handles = [m.register_forward_pre_hook(before(i), with_kwargs=True) for i, m in mixers.items()]
    handles += [m.get_submodule(spec.fused).register_forward_hook(after(i)) for i, m in mixers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def attention_rows(a: Attended, rows: int = 64) -> Iterator[tuple[int, Tensor]]:
    """Blocks of rows of the attention matrix: (first row, [B, H, rows, L']), so that no L x L matrix exists.

    Rows of padded tokens are 0.
    """
    heads, length = a.q_BHLP.shape[1], a.q_BHLP.shape[2]
    k_BHLP = a.k_BGLP.repeat_interleave(heads // a.k_BGLP.shape[1], dim=1)
    for start in range(0, length, rows):
        end = min(start + rows, length)
        scores = (a.scale * (a.q_BHLP[:, :, start:end] @ k_BHLP[:, :, :end].transpose(-1, -2))).float()
        if a.softcap is not None:
            scores = a.softcap * torch.tanh(scores / a.softcap)
        seen = _seen(a, start, end, scores.device)
        scores = scores.masked_fill(~seen, float("-inf"))
        if a.sinks_H is not None:
            sinks = a.sinks_H.to(scores)[:, None, None].expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sinks], dim=-1)
        yield start, F.softmax(scores, dim=-1)[..., :end].masked_fill(~seen, 0)


def attention_heads(a: Attended, value_BLHP: Tensor) -> Tensor:
    """What reaches the output projection, A V of all heads side by side: [B, L, H * P]."""
    blocks = [
        torch.einsum("bhts,bshp->bthp", rows, value_BLHP[:, : rows.shape[3]].to(rows)) for _, rows in attention_rows(a)
    ]
    return torch.cat(blocks, 1).flatten(-2).to(value_BLHP)


def _seen(a: Attended, start: int, end: int, device: torch.device) -> Tensor:
    """Which tokens rows start..end see, [1 or B, 1, rows, end]."""
    distance = torch.arange(start, end, device=device)[:, None] - torch.arange(end, device=device)
    seen = distance >= 0
    if a.window is not None:
        seen &= distance < a.window
    if a.valid_BL is None:
        return seen[None, None]
    return seen & a.valid_BL[:, None, None, :end] & a.valid_BL[:, None, start:end, None]
