"""What conversion keeps exactly, approximates or drops of a teacher, from its config: no weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from .counts import experts
from .families import FamilySpec
from .mixers import HeadsMixer, WindowedMixer, has_window

# factors outside attention, by the names that configs have for them
MULTIPLIERS = ("embedding_multiplier", "residual_multiplier")
INSIDE, BEHIND = "attention inside the window", "attention behind the window"
KEPT_HEADS = "kept heads"


class Treatment(NamedTuple):
    """What becomes of one feature of the teacher; where the layers are not told, of every converted one."""

    feature: str
    treatment: Literal["exact", "approximated", "dropped"]
    note: str


_KEPT = Treatment(KEPT_HEADS, "exact", "softmax over all keys, as before; what follows is of the other heads")


def treatments(
    spec: FamilySpec, config: Any, layers: Sequence[int], mixer: str, init: str = "copy", heads: bool = False
) -> list[Treatment]:
    """One row for each feature that this teacher has: first of the converted layers' attention, then of the rest.

    Args:
        layers: the converted layers; without any, only the rows of what stays.
        mixer: kind of mixer that they become.
        heads: whether some heads of these layers stay attention.
        init: what surgery copies; of `random` mixers only what training can win back is attention's.
    """
    if init == "random" and layers:
        note = "mixers start at random; the alignment stages teach them all of it"
        return [Treatment("attention", "dropped", note), *_untouched(spec, config)]
    kept = [_KEPT] if (heads or mixer == HeadsMixer.kind) and layers else []
    if has_window(mixer) and layers:
        return [*kept, *_windowed(mixer), *_untouched(spec, config)]
    converted = [*kept, *_projections(spec, config, mixer), *_scores(spec, config, layers)] if layers else []
    return [*converted, *_untouched(spec, config)]


def _windowed(mixer: str) -> list[Treatment]:
    inside = "window and sinks are the attention's own: projections, norms, RoPE, soft cap, softmax"
    state = mixer == WindowedMixer.kind
    behind = (
        "tokens that left the window are read from a state" if state else "tokens that left the window are not seen"
    )
    return [
        Treatment(INSIDE, "exact", inside),
        Treatment(BEHIND, "approximated" if state else "dropped", behind),
    ]


def name_layers(layers: Sequence[int]) -> str:
    """Layer indices in words, runs joined: 'layers 0-4, 6'."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    words = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"{'layer' if len(layers) == 1 else 'layers'} {words}"


def _projections(spec: FamilySpec, config: Any, mixer: str) -> list[Treatment]:
    shape = spec.shape(config)
    rows = []
    if shape.qkv_bias:
        rows.append(Treatment("q/k/v biases", "exact", "they become the convolution's bias"))
    if shape.out_bias:
        rows.append(Treatment("output bias", "exact", "copied"))
    if shape.kv_heads < shape.heads:
        note = f"{shape.kv_heads} key/value heads are repeated to {shape.heads}"
        rows.append(Treatment("grouped heads", "exact", note))
    if mixer == "discrete_mamba2":
        rows.append(Treatment("attention scale", "exact", f"the factor {shape.scale:.4g} goes into C"))
    else:
        note = "the norm after the scan cancels any factor of a head; calibration fits the sizes again"
        rows.append(Treatment("attention scale", "dropped", note))
    # Phi names norms that only some of its configs have
    if spec.query_norm is not None and getattr(config, "qk_layernorm", True):
        note = "its weight and typical size become factors of the rows; a token's own size is not divided out"
        rows.append(Treatment("norm of queries and keys", "approximated", note))
    return rows


def _scores(spec: FamilySpec, config: Any, layers: Sequence[int]) -> list[Treatment]:
    fit = "calibration and distillation fit what a decaying state can"
    rows = [Treatment("softmax", "dropped", f"scores are used as they are and decay with distance; {fit}")]
    cap = spec.softcap(config)
    if cap is not None:
        rows.append(Treatment("soft cap of scores", "dropped", f"it was {cap:g}; {fit}"))
    return [*rows, *_positions(spec, config, layers), *_windows(spec, config, layers)]


def _positions(spec: FamilySpec, config: Any, layers: Sequence[int]) -> list[Treatment]:
    shares: dict[float, list[int]] = {}
    for layer in layers:
        shares.setdefault(spec.rotary(config, layer), []).append(layer)
    rows = []
    for share, turned in sorted(shares.items(), reverse=True):
        where = "" if len(shares) == 1 else f" in {name_layers(turned)}"
        if share:
            note = f"it turned {share:.0%} of a head's channels{where}; decay and convolution tell distance instead"
            rows.append(Treatment("RoPE", "dropped", note))
        else:
            note = f"there is none{where or ' in any layer'}, and nothing is lost"
            rows.append(Treatment("layers without RoPE", "exact", note))
    return rows


def _windows(spec: FamilySpec, config: Any, layers: Sequence[int]) -> list[Treatment]:
    windows: dict[int, list[int]] = {}
    for layer in layers:
        window = spec.window(config, layer)
        if window is not None:
            windows.setdefault(window, []).append(layer)
    return [
        Treatment("sliding window", "dropped", f"{window} tokens in {name_layers(slides)}; the decay forgets instead")
        for window, slides in windows.items()
    ]


def _untouched(spec: FamilySpec, config: Any) -> list[Treatment]:
    tied = "tied to the head" if getattr(config, "tie_word_embeddings", False) else "not tied to the head"
    rows = [Treatment("embeddings", "exact", f"untouched, {tied}"), Treatment("norms of layers", "exact", "untouched")]
    count = experts(config)
    if count is None:
        rows.append(Treatment("MLPs", "exact", "untouched"))
    else:
        rows.append(Treatment("experts and router", "exact", f"{count} in a layer, untouched"))
    for name in MULTIPLIERS:
        factor = getattr(config, name, 1.0)
        if factor != 1:
            rows.append(Treatment(name.replace("_", " "), "exact", f"{factor:g}, untouched"))
    factor, cap = spec.logits(config)
    if factor != 1:
        rows.append(Treatment("logits multiplier", "exact", f"{factor:.4g}, untouched"))
    if cap is not None:
        rows.append(Treatment("soft cap of logits", "exact", f"{cap:g}, untouched"))
    return rows
