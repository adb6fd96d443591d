"""Teacher and plan to hybrid student, by copying: C from Q, B from K, x from V, out from O. Nothing is trained.

GQA repeats whole key/value head blocks. A q/k/v bias passes through the identity tap into the convolution's bias.
The attention scale goes into C for `discrete_mamba2`; in `mamba2` the norm cancels it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .families import AttentionShape, FamilySpec
from .mixers import Mixer, MixerShape, make_mixer
from .mixers.discrete_mamba2 import DiscreteMamba2Mixer
from .mixers.mamba2 import Mamba2Mixer

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


def expand_kv(weight: Tensor, attention: AttentionShape) -> Tensor:
    """Repeats key/value head blocks (never rows) to one block per query head; [kv*P, ...] to [H*P, ...]."""
    blocks = weight.unflatten(0, (attention.kv_heads, attention.head_dim))
    return blocks.repeat_interleave(attention.heads // attention.kv_heads, dim=0).flatten(0, 1)


@torch.no_grad()
def copy_attention(
    attention: nn.Module, spec: FamilySpec, shape: AttentionShape, kind: str, layer: int, conv_kernel: int = 4
) -> Mixer:
    """A mixer that starts as the attention layer's copy, in the attention's dtype and on its device."""
    query, key, value, out = (_linear(attention, name) for name in (spec.query, spec.key, spec.value, spec.out))
    device, dtype = query.weight.device, query.weight.dtype
    mixer = make_mixer(kind, faithful_shape(shape, conv_kernel), layer).to(device=device, dtype=dtype)
    if isinstance(mixer, DiscreteMamba2Mixer):
        gate_rows(mixer).zero_()
    mixer.conv1d.weight.zero_()
    mixer.conv1d.weight[:, 0, -1] = 1
    conv_bias(mixer).zero_()
    rows = torch.cat([expand_kv(value.weight, shape), expand_kv(key.weight, shape), query.weight])
    conv_rows(mixer).copy_(rows)
    if query.bias is not None:
        conv_bias(mixer).copy_(torch.cat([expand_kv(value.bias, shape), expand_kv(key.bias, shape), query.bias]))
    mixer.out_proj.weight.copy_(out.weight)
    if out.bias is not None:
        mixer.out_proj.bias.copy_(out.bias)
    set_decay(mixer, torch.full((shape.heads,), COPY_DISTANCE, dtype=torch.float64))
    if isinstance(mixer, DiscreteMamba2Mixer):
        queries = slice(mixer.shape.conv_channels - mixer.shape.groups * mixer.shape.state, mixer.shape.conv_channels)
        conv_rows(mixer)[queries] *= shape.scale
        conv_bias(mixer)[queries] *= shape.scale
    return mixer


def _linear(attention: nn.Module, name: str) -> nn.Linear:
    linear = attention.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def conv_bias(mixer: Mixer) -> Tensor:
    """The convolution's bias, which every mixer has."""
    assert mixer.conv1d.bias is not None
    return mixer.conv1d.bias


def conv_rows(mixer: Mixer) -> Tensor:
    """The rows of in_proj that feed the convolution, [x | B | C], as a view."""
    start = mixer.shape.inner if isinstance(mixer, Mamba2Mixer) else 0
    return mixer.in_proj.weight[start : start + mixer.shape.conv_channels]


def gate_rows(mixer: Mixer) -> Tensor:
    """The rows of in_proj that make the gate z, as a view."""
    start = 0 if isinstance(mixer, Mamba2Mixer) else mixer.shape.conv_channels
    return mixer.in_proj.weight[start : start + mixer.shape.inner]


@torch.no_grad()
def set_decay(mixer: Mixer, distance_H: Tensor, dt_H: Tensor | None = None) -> None:
    """Gives every head a constant decay whose geometric profile has mean distance `distance_H` tokens.

    -ln a = ln(1 + 1/d). Rows of dt (or of a) become zero, so that the decay is the same at every token; `dt_H` is the
    weight of each token's write in the stock mixer, 1 where left out. Both are float64, [H].
    """
    mixer.in_proj.weight[-mixer.shape.heads :] = 0
    if isinstance(mixer, DiscreteMamba2Mixer):
        mixer.a_bias.copy_(-distance_H.log())
        return
    assert isinstance(mixer, Mamba2Mixer)
    dt_H = torch.ones_like(distance_H) if dt_H is None else dt_H
    mixer.dt_bias.copy_(inverse_softplus(dt_H))
    mixer.A_log.copy_(torch.log1p(1 / distance_H).log() - dt_H.log())


def inverse_softplus(value: Tensor) -> Tensor:
    """x with log(1 + e^x) = value, without overflow for large values."""
    return value + torch.log(-torch.expm1(-value))
