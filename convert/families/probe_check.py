"""What a probed family must reproduce on its tiny copy, or be refused; and what only the copy's numbers tell.

B batch, L length, D model width, H query heads, P head width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .spec import FamilySpec, first_of, head_width, norm_weight, rotary_share, sliding_window

if TYPE_CHECKING:
    from ..capture import MixerCall

# longer than the window of the tiny copy
LENGTH = 20


class CheckError(Exception):
    """A check failed; the text says which."""


@torch.no_grad()
def checked(model: Any, spec: FamilySpec) -> FamilySpec:
    """The spec with scale, windows, norms, RoPE and logits as the copy has them.

    Raises:
        CheckError: something that was not found, or that the spec does not make again.
    """
    from ..capture import captured

    layers = list(range(model.config.num_hidden_layers))
    x_BL = torch.randint(0, model.config.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    outputs, handles = _child_outputs(spec.decoder_layers(model)[0])
    with captured(model, spec, layers, attention=True) as calls:
        logits_BLV = model(x_BL, use_cache=False).logits
        last_BLD = model.base_model(x_BL, use_cache=False).last_hidden_state
    for handle in handles:
        handle.remove()
    if any(calls[i].attended is None for i in layers):
        raise CheckError("its attention calls no registered attention function")
    entered = outputs.pop("input")
    norm = next((n for n, out in outputs.items() if torch.equal(out, calls[0].input_BLD)), None)
    if norm is None and not torch.equal(entered, calls[0].input_BLD):
        raise CheckError("what norms the input of its attention was not found")
    spec = dataclasses.replace(
        spec,
        mixer_norm=lambda _config: norm,
        scale=_scale(model.config, calls),
        window=_window(model.config, calls),
        logits=_logits(model, last_BLD, logits_BLV),
        unit_offset=_unit_offset(spec, spec.attention(model, 0)),
    )
    turns = [_check_layer(model, spec, i, call) for i, call in sorted(calls.items())]
    halves = all(halves for share, halves in turns if share)
    return dataclasses.replace(spec, rotary=_rotary(model.config, [share for share, _ in turns]), rotary_halves=halves)


def _child_outputs(layer: nn.Module) -> tuple[dict[str, Tensor], list[Any]]:
    """What a layer gets and what its children return, by name, once a forward ran."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(_module: nn.Module, _args: tuple, output: Any) -> None:
            if isinstance(output, Tensor):
                seen[name] = output

        return keep

    def first(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen["input"] = args[0] if args else kwargs["hidden_states"]

    handles: list[Any] = [child.register_forward_hook(hook(name)) for name, child in layer.named_children()]
    return seen, [*handles, layer.register_forward_pre_hook(first, with_kwargs=True)]


def _scale(config: Any, calls: dict[int, MixerCall]) -> Callable[[Any], float]:
    ways: list[Callable[[Any], float]] = [lambda c: head_width(c) ** -0.5]
    if first_of(config, "query_pre_attn_scalar"):
        ways.append(lambda c: c.query_pre_attn_scalar**-0.5)
    if first_of(config, "attention_multiplier"):
        ways.append(lambda c: c.attention_multiplier)
    for way in ways:
        if all(call.attended and abs(call.attended.scale - way(config)) < 1e-6 for call in calls.values()):
            return way
    raise CheckError("the scale of its attention scores is none of the usual ones")


def _window(config: Any, calls: dict[int, MixerCall]) -> Callable[[Any, int], int | None]:
    ways: tuple[Callable[[Any, int], int | None], ...] = (
        sliding_window,
        lambda c, _layer: first_of(c, "sliding_window"),
        lambda _c, _layer: None,
    )
    for way in ways:
        if all(call.attended and call.attended.window == way(config, i) for i, call in calls.items()):
            return way
    raise CheckError("its sliding windows do not follow its config's layer_types and sliding_window")


def _logits(model: Any, last_BLD: Tensor, logits_BLV: Tensor) -> Callable[[Any], tuple[float, float | None]]:
    config, plain = model.config, model.get_output_embeddings()(last_BLD)
    ways: list[Callable[[Any], tuple[float, float | None]]] = [
        lambda c: (1.0, first_of(c, "final_logit_softcapping")),
    ]
    if first_of(config, "logit_scale"):
        ways.append(lambda c: (c.logit_scale, None))
    if first_of(config, "logits_scaling"):
        ways.append(lambda c: (1 / c.logits_scaling, None))
    for way in ways:
        factor, cap = way(config)
        own = plain * factor
        if _same(own if cap is None else cap * torch.tanh(own / cap), logits_BLV):
            return way
    raise CheckError("its logits are not its output embedding of the last hidden state, scaled in a usual way")


def _unit_offset(spec: FamilySpec, attention: nn.Module) -> bool:
    """Whether the norms of q and k multiply by 1 + weight; these norms must be what surgery can fold."""
    offsets = set()
    for name in filter(None, (spec.query_norm, spec.key_norm)):
        norm = attention.get_submodule(name)
        weight = getattr(norm, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 1:
            raise CheckError(f"{name} has no weight that is one vector")
        # of mean square 1 and, for LayerNorm, mean 0
        ones = torch.ones_like(weight)
        ones[::2] = -1
        factor = (norm(ones) - norm(-ones)) / 2 * ones
        if _same(norm(ones + 1) - norm(-ones - 1), norm(ones) - norm(-ones)) != isinstance(norm, nn.LayerNorm):
            raise CheckError(f"{name} centres, and is no LayerNorm")
        fits = [offset for offset in (False, True) if _same(factor, norm_weight(norm, offset).float(), 1e-3)]
        if not fits:
            raise CheckError(f"{name} multiplies neither by its weight nor by 1 + weight")
        offsets.add(fits[0])
    if len(offsets) > 1:
        raise CheckError("its norms of q and k differ in kind")
    return offsets == {True}


def _check_layer(model: Any, spec: FamilySpec, layer: int, call: MixerCall) -> tuple[float, bool]:
    """A V O must be the layer's own output, and q and k as long as the spec makes them; the share that RoPE turns, and
    whether it turns halves of it against each other by the tables the layer gets."""
    from ssmorph.kernels.common.rope import turned

    from ..capture import attention_heads
    from ..rope import tables_in
    from ..surgery import expand_kv

    attention, shape = spec.attention(model, layer), spec.shape(model.config)
    parts, seen = spec.projections(attention, model.config), call.attended
    assert seen is not None
    bias = None if parts.value.bias is None else expand_kv(parts.value.bias, shape)
    value = F.linear(call.input_BLD, expand_kv(parts.value.weight, shape), bias)
    value_BLHP = value.unflatten(-1, (shape.heads, shape.head_dim))
    heads_BLE = attention_heads(seen, value_BLHP)
    if not _same(heads_BLE, call.heads_BLE):
        raise CheckError("attention over its values does not make what enters the output projection")
    if not _same(attention.get_submodule(spec.out)(heads_BLE), call.output_BLD):
        raise CheckError("the output projection does not make what leaves its attention")
    shares, halves, tables = [], True, tables_in(call.kwargs)
    sides = (("query", parts.query, spec.query_norm, seen.q_BHLP), ("key", parts.key, spec.key_norm, seen.k_BGLP))
    for word, part, norm, rotated in sides:
        own = _normed(F.linear(call.input_BLD, part.weight, part.bias), attention, norm, shape.head_dim)
        if not _same(own.norm(dim=-1), rotated.norm(dim=-1)):
            raise CheckError(f"its {word} heads have other lengths than projection and norm before RoPE give them")
        shares.append(((own - rotated).abs().amax((0, 1, 2)) > 1e-4).float().mean().item())
        halves &= tables is not None and _same(turned(own, *(t.unsqueeze(1) for t in tables)), rotated)
    return max(shares), halves


def _normed(rows_BLE: Tensor, attention: nn.Module, name: str | None, width: int) -> Tensor:
    """Queries or keys [B, heads, L, P] after their norm, which is of each head or over all of them."""
    norm = None if name is None else attention.get_submodule(name)
    if norm is not None and norm.get_parameter("weight").numel() != width:
        return norm(rows_BLE).unflatten(-1, (-1, width)).transpose(1, 2)
    heads_BHLP = rows_BLE.unflatten(-1, (-1, width)).transpose(1, 2)
    return heads_BHLP if norm is None else norm(heads_BHLP)


def _rotary(config: Any, shares: list[float]) -> Callable[[Any, int], float]:
    if all(abs(share - rotary_share(config, i)) < 1e-3 for i, share in enumerate(shares)):
        return rotary_share
    kinds = first_of(config, "layer_types", default=["all"] * len(shares))
    by_kind = dict(zip(kinds, shares, strict=True))
    if any(abs(by_kind[kind] - share) > 1e-3 for kind, share in zip(kinds, shares, strict=True)):
        raise CheckError("its layers turn different shares of a head by RoPE, and layer_types does not say which")
    return lambda c, layer: by_kind[first_of(c, "layer_types", default=["all"] * (layer + 1))[layer]]


def _same(own: Tensor, expected: Tensor, tolerance: float = 1e-4) -> bool:
    if own.shape != expected.shape:
        return False
    return bool((own - expected).abs().max() <= tolerance * (1 + expected.abs().max()))
