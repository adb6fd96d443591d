"""What each approximation and drop of attention costs, measured on the teacher: one changed, all else as it does it.

The cost in a layer is ||o' - o||^2 / ||o||^2, where o is what leaves its attention on real tokens and o' the same with
that one change. The layer's input is the teacher's own, so errors do not add up over layers.

W windows, L length, D model width, E heads times head width, H query heads, P head width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import statistics
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .capture import MixerCall, attention_heads, captured
from .families import FamilySpec
from .families.spec import Projection, linear
from .surgery import expand_kv, folded

NORM, CAP, ROPE, WINDOW = "norm of queries and keys", "soft cap of scores", "RoPE", "sliding window"
MEASURED = (NORM, CAP, ROPE, WINDOW)


class Cost(NamedTuple):
    """Relative squared error of the attention output, by layer."""

    errors: dict[int, float]

    def median(self) -> float:
        """Of the layers."""
        return statistics.median(self.errors.values())

    def worst(self) -> tuple[int, float]:
        """The layer that loses most, and its error."""
        return max(self.errors.items(), key=lambda item: item[1])


class _Call(NamedTuple):
    """One call of an attention module: what it was called with, what it returned, what it was made of."""

    model: Any
    spec: FamilySpec
    layer: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    seen: MixerCall

    def attention(self) -> nn.Module:
        return self.spec.attention(self.model, self.layer)

    def again(self, **changed: Any) -> Tensor:
        """The output with other arguments, [1, L, D]; past the module's own hooks."""
        out = self.attention().forward(*self.args, **{**self.kwargs, **changed})
        return out[0] if isinstance(out, tuple) else out


@torch.no_grad()
def measure(
    model: Any, spec: FamilySpec, layers: Sequence[int], features: Collection[str], windows_WL: Tensor
) -> dict[str, Cost | str]:
    """The cost of each of `features`, by the names of treatment.py, or why it is not measured.

    Args:
        layers: the converted layers; those that do not have a feature are left out of its cost.

    Raises:
        ValueError: projections that are quantised, or of other sizes than the config says.
    """
    asked = [feature for feature in MEASURED if feature in features]
    reasons = {f: why for f in asked if (why := _obstacle(model, spec, f, layers, windows_WL.shape[1]))}
    sums: dict[str, dict[int, list[float]]] = {f: {} for f in asked if f not in reasons}
    rows = bool(sums.keys() & {CAP, WINDOW})
    for window_1L in windows_WL.split(1) if sums else ():
        for call in _calls(model, spec, list(layers), window_1L, rows):
            for feature, by_layer in sums.items():
                if not _has(spec, feature, model.config, call.layer, window_1L.shape[1]):
                    continue
                own, total = call.seen.output_BLD, by_layer.setdefault(call.layer, [0.0, 0.0])
                total[0] += float((_CHANGES[feature](call) - own).double().square().sum())
                total[1] += float(own.double().square().sum())
    costs = {f: Cost({i: error / size for i, (error, size) in by_layer.items()}) for f, by_layer in sums.items()}
    return {feature: reasons.get(feature) or costs[feature] for feature in asked}


def _obstacle(model: Any, spec: FamilySpec, feature: str, layers: Sequence[int], length: int) -> str | None:
    """Why a feature cannot be measured; None where it can."""
    if feature == NORM and spec.fused is not None:
        return f"{spec.fused} makes queries, keys and values at once"
    arguments = inspect.signature(spec.attention(model, layers[0]).forward).parameters
    if feature == ROPE and "position_embeddings" not in arguments:
        return "its attention is not given RoPE's cos and sin"
    if not any(_has(spec, feature, model.config, i, length) for i in layers):
        return (
            f"no window is shorter than the {length} tokens seen" if feature == WINDOW else "no converted layer has it"
        )
    return None


def _has(spec: FamilySpec, feature: str, config: Any, layer: int, length: int) -> bool:
    """Whether a layer has the feature, and these windows can show it."""
    if feature == ROPE:
        return spec.rotary(config, layer) > 0
    if feature == WINDOW:
        window = spec.window(config, layer)
        return window is not None and window < length
    return True


def _calls(model: Any, spec: FamilySpec, layers: list[int], tokens_1L: Tensor, rows: bool) -> Iterator[_Call]:
    """The attention calls of one forward, layer after layer, once the forward is over."""
    given: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def keep(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given[index] = (args, kwargs)

        return hook

    with contextlib.ExitStack() as hooks:
        for i in layers:
            handle = spec.attention(model, i).register_forward_pre_hook(keep(i), with_kwargs=True)
            hooks.callback(handle.remove)
        seen = hooks.enter_context(captured(model, spec, layers, attention=rows))
        model(tokens_1L, use_cache=False, logits_to_keep=1)
    for i in layers:
        yield _Call(model, spec, i, *given[i], seen.pop(i))


def _folded_norms(call: _Call) -> Tensor:
    """Norms made factors of the rows, exactly as surgery copies them; calibration has yet to fit each head's factor."""
    spec, attention = call.spec, call.attention()
    parts, width = spec.projections(attention, call.model.config), spec.shape(call.model.config).head_dim
    sides = ((spec.query, spec.query_norm, parts.query), (spec.key, spec.key_norm, parts.key))
    with contextlib.ExitStack() as hooks:
        for name, norm, part in sides:
            if norm is None:
                continue
            rows = folded(part, attention, norm, spec.unit_offset, width)
            hooks.callback(linear(attention, name).register_forward_hook(_instead(rows)).remove)
            hooks.callback(attention.get_submodule(norm).register_forward_hook(_unchanged).remove)
        return call.again()


def _instead(rows: Projection) -> Callable[..., Tensor]:
    def hook(_module: nn.Module, args: tuple[Tensor], _output: Tensor) -> Tensor:
        return F.linear(args[0], rows.weight, rows.bias)

    return hook


def _unchanged(_module: nn.Module, args: tuple[Tensor], _output: Tensor) -> Tensor:
    return args[0]


def _without_rope(call: _Call) -> Tensor:
    """No rotation, but the factor that some kinds of RoPE multiply by: cos and sin have it as their length."""
    cos, sin = call.kwargs["position_embeddings"]
    return call.again(position_embeddings=(torch.hypot(cos, sin), torch.zeros_like(sin)))


def _without_cap(call: _Call) -> Tensor:
    return _rows_changed(call, softcap=None)


def _without_window(call: _Call) -> Tensor:
    return _rows_changed(call, window=None)


def _rows_changed(call: _Call, **change: Any) -> Tensor:
    """The output from attention's rows with this change, over values from the layer's input."""
    spec, attention, attended = call.spec, call.attention(), call.seen.attended
    assert attended is not None, "soft caps and windows are changed in attention's rows"
    shape = spec.shape(call.model.config)
    weight, bias = spec.projections(attention, call.model.config).value
    value_BLE = F.linear(
        call.seen.input_BLD, expand_kv(weight, shape), None if bias is None else expand_kv(bias, shape)
    )
    value_BLHP = value_BLE.unflatten(-1, (shape.heads, shape.head_dim))
    heads_BLE = attention_heads(dataclasses.replace(attended, **change), value_BLHP)
    return linear(attention, spec.out)(heads_BLE)


_CHANGES: dict[str, Callable[[_Call], Tensor]] = {
    NORM: _folded_norms,
    CAP: _without_cap,
    ROPE: _without_rope,
    WINDOW: _without_window,
}
