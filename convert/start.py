"""What a mixer starts from besides copied projections: parts of it as views, its decay, and the published start.

The published starts are those of the systems that this project is compared with. `mamba2`: state-spaces' Mamba-2 as
The Mamba in the Llama and MaTVLM take it (steps of 0.001 to 0.1, A of 1 to 16, D = 1, torch's own convolution and
gate). `discrete_mamba2`: goombalab/mohawk (identity convolution and gate, D = 1, no bias of the decay).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .mixers import ScanMixer
from .mixers.discrete_mamba2 import DiscreteMamba2Mixer
from .mixers.mamba2 import Mamba2Mixer

STEPS = (1e-3, 1e-1)
RATES = (1.0, 16.0)
# goombalab/mohawk, utils/init_weights.py: the output projection is divided by the root of this, whatever the model
OUT_LAYERS = 24


@torch.no_grad()
def published_start(mixer: ScanMixer) -> None:
    """Puts a mixer whose projections are as torch draws them where its publication starts it."""
    mixer.D.fill_(1)
    if isinstance(mixer, DiscreteMamba2Mixer):
        gate_rows(mixer).zero_()
        identity_convolution(mixer)
        mixer.out_proj.weight /= math.sqrt(OUT_LAYERS)
        return
    assert isinstance(mixer, Mamba2Mixer)
    low, high = map(math.log, STEPS)
    mixer.dt_bias.copy_(inverse_softplus(mixer.dt_bias.new_empty(mixer.shape.heads).uniform_(low, high).exp()))
    mixer.A_log.uniform_(*RATES).log_()


@torch.no_grad()
def identity_convolution(mixer: ScanMixer) -> None:
    """Taps that pass the current token on, and no bias."""
    mixer.conv1d.weight.zero_()
    mixer.conv1d.weight[:, 0, -1] = 1
    conv_bias(mixer).zero_()


def conv_bias(mixer: ScanMixer) -> Tensor:
    """The convolution's bias, which every scan has."""
    assert mixer.conv1d.bias is not None
    return mixer.conv1d.bias


def conv_rows(mixer: ScanMixer) -> Tensor:
    """The rows of in_proj that feed the convolution, [x | B | C], as a view."""
    start = mixer.shape.inner if isinstance(mixer, Mamba2Mixer) else 0
    return mixer.in_proj.weight[start : start + mixer.shape.conv_channels]


def gate_rows(mixer: ScanMixer) -> Tensor:
    """The rows of in_proj that make the gate z, as a view."""
    start = 0 if isinstance(mixer, Mamba2Mixer) else mixer.shape.conv_channels
    return mixer.in_proj.weight[start : start + mixer.shape.inner]


@torch.no_grad()
def set_decay(mixer: ScanMixer, distance_H: Tensor, dt_H: Tensor | None = None) -> None:
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
