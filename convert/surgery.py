"""Teacher and plan to hybrid student, by copying: C from Q, B from K, x from V, out from O. Nothing is trained.

GQA repeats whole key/value head blocks. A q/k/v bias passes through the identity tap into the convolution's bias.
The attention scale goes into C for `discrete_mamba2`; in `mamba2` the norm cancels it. Norms of queries and keys become
factors of their rows: no mixer divides by a token's own size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import fail
from .families import AttentionShape, FamilySpec
from .families.spec import Projection, linear, norm_weight
from .mixers import HeadsMixer, Mixer, MixerShape, ScanMixer, has_window, keeps_attention, make_mixer
from .mixers.discrete_mamba2 import DiscreteMamba2Mixer
from .mixers.mamba2 import Mamba2Mixer
from .plan import sharing_heads
from .start import conv_bias, conv_rows, gate_rows, identity_convolution, published_start, set_decay

# a decay of 1/64 per token: a neutral memory for the plain copy, before the teacher's own distances are known
COPY_DISTANCE = 64.0


def faithful_shape(attention: AttentionShape, conv_kernel: int) -> MixerShape:
    """The mixer in which each query head keeps its own Q and K: groups = heads, state = head width."""
    return MixerShape(
        hidden=attention.hidden,
        heads=attention.heads,
        groups=attention.heads,
        head_dim=attention.head_dim,
        state=attention.head_dim,
        conv_kernel=conv_kernel,
        eps=attention.eps,
        out_bias=attention.out_bias,
    )


@dataclass(frozen=True, kw_only=True)
class MixerChoice:
    """What layers become and from where they start.

    Attributes:
        kept: the query heads that stay attention, (layer, head) each. Layers of `mamba2_heads` without one become
            mamba2; around a window the others of their key/value heads stay too.
        window: tokens of the attention window, its sinks included.
        state: prototypes that the state behind it holds for each key/value head; 0 for none.
    """

    kind: str
    conv_kernel: int = 4
    init: str = "copy"
    window: int = 64
    sinks: int = 4
    state: int = 64
    kept: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, mixer: Mixer) -> MixerChoice:
        """What made this mixer, as far as its sizes tell."""
        shape = mixer.shape
        kept = tuple((mixer.layer_idx, head) for head in shape.kept)
        return cls(kind=mixer.kind, conv_kernel=shape.conv_kernel, window=shape.window, sinks=shape.sinks,
                   state=shape.state, kept=kept)  # fmt: skip

    def at(self, layer: int) -> MixerChoice:
        """What this layer becomes: with its own kept heads alone, and mamba2 where `mamba2_heads` has none."""
        if not keeps_attention(self.kind):
            return replace(self, kept=())
        kept = tuple(sorted({pair for pair in self.kept if pair[0] == layer}))
        return replace(self, kept=kept, kind=self.kind if kept or has_window(self.kind) else Mamba2Mixer.kind)


def shape_of(attention: AttentionShape, choice: MixerChoice, turned: int = 0) -> MixerShape:
    """The sizes of the mixer that stands for a layer's attention; the choice is of that layer (`at`).

    `turned` channels of a head are turned by RoPE; only the state behind a window needs to know.
    """
    if not has_window(choice.kind):
        kept = tuple(head for _, head in choice.kept)
        faithful = faithful_shape(attention, choice.conv_kernel)
        return replace(faithful, groups=attention.kv_heads, kept=kept) if kept else faithful
    return MixerShape(
        hidden=attention.hidden,
        heads=attention.heads,
        groups=attention.kv_heads,
        head_dim=attention.head_dim,
        kept=tuple(head for _, head in sharing_heads(choice.kept, attention)),
        state=0 if choice.kind == "window" else choice.state,
        conv_kernel=1,
        eps=attention.eps,
        out_bias=attention.out_bias,
        window=choice.window,
        sinks=choice.sinks,
        turned=0 if choice.kind == "window" else turned,
    )


def require_attention_function(spec: FamilySpec, config: Any, kind: str) -> None:
    """Raises ValueError where a mixer of this kind cannot ask the family's attention by name."""
    if keeps_attention(kind) and not spec.attention_function:
        raise fail("student.mixer", "kept attention needs a family with registered attention functions",
                   f"{kind} for {config.model_type}", "Use mamba2.")  # fmt: skip


def start_mixer(teacher: Any, spec: FamilySpec, layer: int, choice: MixerChoice) -> Mixer:
    """The mixer of a layer before anything is fitted; where attention is kept: that part of the layer's own.

    Raises:
        ValueError: as `copy_attention`; kept attention in a family whose attention cannot be asked by name.
    """
    choice = choice.at(layer)
    if not keeps_attention(choice.kind):
        return copy_attention(teacher, spec, layer, choice.kind, choice.conv_kernel, choice.init)
    require_attention_function(spec, teacher.config, choice.kind)
    whole = None
    if choice.kept and not has_window(choice.kind):
        # before the mixer is made, so that the same seed draws the same gates as for mamba2
        whole = copy_attention(teacher, spec, layer, Mamba2Mixer.kind, choice.conv_kernel, choice.init)
    attention = copy.deepcopy(spec.attention(teacher, layer)).requires_grad_(True)
    shape = shape_of(spec.shape(teacher.config), choice, spec.turned(teacher.config, layer))
    mixer = make_mixer(choice.kind, shape, layer, attention, spec.out, spec.head_rows())
    weight = linear(attention, spec.out).weight
    mixer = mixer.to(device=weight.device, dtype=weight.dtype)
    if isinstance(mixer, HeadsMixer) and mixer.scan is not None:
        assert isinstance(whole, Mamba2Mixer)
        _copy_heads(mixer.scan, whole, mixer.rest)
    return mixer


@torch.no_grad()
def _copy_heads(part: Mamba2Mixer, whole: Mamba2Mixer, heads: Sequence[int]) -> None:
    """Gives the heads of `part`, in order, what these `heads` of `whole` have; groups = heads in both."""
    count, x, state = whole.shape.heads, whole.shape.head_dim, whole.shape.state
    # rows of each head in every block of a parameter
    blocks = {"in_proj.weight": [x, x, state, state, 1], "norm.weight": [x]}
    blocks |= {name: [x, state, state] for name in ("conv1d.weight", "conv1d.bias")}
    blocks |= {name: [1] for name in ("dt_bias", "A_log", "D")}
    for name, rows in blocks.items():
        parts = whole.get_parameter(name).split([count * r for r in rows])
        taken = [p.unflatten(0, (count, -1))[list(heads)].flatten(0, 1) for p in parts]
        part.get_parameter(name).copy_(torch.cat(taken))


def expand_kv(weight: Tensor, attention: AttentionShape) -> Tensor:
    """Repeats key/value head blocks (never rows) to one block per query head; [kv*P, ...] to [H*P, ...]."""
    blocks = weight.unflatten(0, (attention.kv_heads, attention.head_dim))
    return blocks.repeat_interleave(attention.heads // attention.kv_heads, dim=0).flatten(0, 1)


@torch.no_grad()
def copy_attention(
    teacher: Any, spec: FamilySpec, layer: int, kind: str, conv_kernel: int = 4, init: str = "copy"
) -> Mixer:
    """A mixer for a layer's place, in the attention's dtype and on its device.

    Args:
        init: `copy` of the attention that shows through; `projections` copied into a mixer that otherwise starts as
            published (start.py); `random`: nothing copied.

    Raises:
        ValueError: weights that are quantised, or of other sizes than the config says.
    """
    attention, shape = spec.attention(teacher, layer), spec.shape(teacher.config)
    parts, out = spec.projections(attention, teacher.config), linear(attention, spec.out)
    mixer = make_mixer(kind, faithful_shape(shape, conv_kernel), layer, attention, spec.out)
    assert isinstance(mixer, ScanMixer)
    if init == "copy":
        _show_through(mixer)
    else:
        published_start(mixer)
    mixer.to(device=parts.query.weight.device, dtype=parts.query.weight.dtype)
    if init != "random":
        query = folded(parts.query, attention, spec.query_norm, spec.unit_offset, shape.head_dim)
        key = folded(parts.key, attention, spec.key_norm, spec.unit_offset, shape.head_dim)
        _copy_projections(mixer, shape, query, key, parts.value, out)
    return mixer


def _show_through(mixer: ScanMixer) -> None:
    """All but the projections: a gate that MOHAWK's form leaves open, the identity tap, one neutral decay."""
    if isinstance(mixer, DiscreteMamba2Mixer):
        gate_rows(mixer).zero_()
    identity_convolution(mixer)
    set_decay(mixer, torch.full((mixer.shape.heads,), COPY_DISTANCE, dtype=torch.float64))


def _copy_projections(
    mixer: ScanMixer, shape: AttentionShape, query: Projection, key: Projection, value: Projection, out: nn.Linear
) -> None:
    """Q, K, V into the rows of C, B, x and O into out_proj; a bias passes through the taps to the convolution's."""
    conv_rows(mixer).copy_(torch.cat([expand_kv(value.weight, shape), expand_kv(key.weight, shape), query.weight]))
    taps_C = mixer.conv1d.weight.sum((1, 2))
    blocks = (t.split([shape.heads * shape.head_dim] * 3) for t in (conv_bias(mixer), taps_C))
    for block, taps, bias in zip(*blocks, (value.bias, key.bias, query.bias), strict=True):
        if bias is not None:
            block += taps * (bias if len(bias) == len(block) else expand_kv(bias, shape))
    mixer.out_proj.weight.copy_(out.weight)
    if out.bias is not None:
        mixer.out_proj.bias.copy_(out.bias)
    if isinstance(mixer, DiscreteMamba2Mixer):
        queries = slice(mixer.shape.conv_channels - mixer.shape.groups * mixer.shape.state, mixer.shape.conv_channels)
        conv_rows(mixer)[queries] *= shape.scale
        conv_bias(mixer)[queries] *= shape.scale


def folded(part: Projection, attention: nn.Module, name: str | None, unit_offset: bool, head_dim: int) -> Projection:
    """Rows of queries or keys with their norm made a factor: its weight, over the size that the rows alone suggest.

    The size is what inputs of unit variance without correlations would have: the root mean square of a head's rows, or
    of all rows where the norm spans all heads. Calibration fits each head's own factor to real inputs later.
    """
    norm = None if name is None else getattr(attention, name, None)
    if norm is None:
        return part
    rows = part.weight.double().unflatten(0, (-1, head_dim))
    bias = rows.new_zeros(rows.shape[:2]) if part.bias is None else part.bias.double().unflatten(0, (-1, head_dim))
    weight, shift, centres, spans_all = _norm_of(norm, unit_offset, *rows.shape[:2])
    if centres:
        rows, bias = rows - rows.mean(1, keepdim=True), bias - bias.mean(1, keepdim=True)
    square_H = rows.square().sum(-1).mean(1) + bias.square().mean(1)
    size_H1 = (square_H.mean().expand_as(square_H) if spans_all else square_H).sqrt().clamp_min(1e-12)[:, None]
    rows, bias = rows * (weight / size_H1)[..., None], bias * weight / size_H1 + shift
    has_bias = part.bias is not None or bool(shift.any())
    dtype = part.weight.dtype
    return Projection(rows.flatten(0, 1).to(dtype), bias.flatten().to(dtype) if has_bias else None)


def _norm_of(norm: nn.Module, unit_offset: bool, heads: int, width: int) -> tuple[Tensor, Tensor, bool, bool]:
    """What a norm of queries or keys multiplies by and adds, [H, P]; whether it centres; whether it spans all heads."""
    # StableLM has a LayerNorm of its own for each head
    each = getattr(norm, "norms", None)
    norms = list(each) if isinstance(each, nn.ModuleList) else [norm]
    weights = [norm_weight(n, unit_offset) for n in norms]
    biases = [getattr(n, "bias", None) for n in norms]
    weight = torch.cat(weights)
    shift = torch.cat([torch.zeros_like(w) if b is None else b.double() for w, b in zip(weights, biases, strict=True)])
    spans_all = len(norms) == 1 and weight.numel() == heads * width and heads > 1
    weight, shift = (t.view(-1, width).expand(heads, width) for t in (weight, shift))
    return weight, shift, isinstance(norms[0], nn.LayerNorm), spans_all
