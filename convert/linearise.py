"""How the stock mixer is set up to act as plain linear attention, which is what the closed forms of calibration fit.

Its SiLU convolution, gate without bias and RMS norm each distort a copied head. All three have a nearly linear regime:
small inputs for SiLU, a constant row for the gate, and outputs far below the norm's eps. In a trial on
SmolLM2-135M the norm's linear regime is worth most: held-out error of a layer 0.33-0.36 against 0.45-0.47 normalised.

B batch, L length, D model width, H heads, P head width, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .mixers.discrete_mamba2 import GATE_OPEN
from .mixers.mamba2 import Mamba2Mixer
from .moments import Moments
from .start import conv_bias, conv_rows, gate_rows, inverse_softplus

# largest |v| that enters SiLU (its 99.9 % quantile), where silu(v) = v/2 within about v/2 of itself
TAP_LEVEL = 0.2
# mean square of a head over the norm's eps
NORM_FILL = 0.01


def open_gate(mixer: Mamba2Mixer, inputs: Sequence[Tensor]) -> None:
    """Solves for the row g with g.u closest to silu^-1(1) and repeats it over all channels of the gate."""
    width = mixer.shape.hidden
    moments = Moments(width, 1, mixer.in_proj.weight.device)
    for u_BLD in inputs:
        moments.add(u_BLD, u_BLD.new_full((*u_BLD.shape[:-1], 1), GATE_OPEN))
    gate_rows(mixer).copy_(moments.solve(1e-4, mixer.in_proj.weight.new_zeros(1, width)))


def shrink_taps(
    mixer: Mamba2Mixer, u_BLD: Tensor, constants: Tensor, level: float = TAP_LEVEL
) -> tuple[Tensor, Tensor]:
    """Scales the newest tap of each head so that SiLU sees small inputs.

    Args:
        constants: channels without an input, whose bias has to come out of SiLU as exactly half of itself.

    Returns:
        The factors by which the head's x shrank, and by which dt has to make up for x, B and C; [H] each.
    """
    shape = mixer.shape
    blocks = shape.heads * [shape.head_dim] + 2 * shape.groups * [shape.state]
    sample_TC = F.linear(u_BLD, conv_rows(mixer), mixer.conv1d.bias).flatten(0, 1)
    # what is zero throughout, as in a pruned head, is left as it is
    large_S = torch.stack([_quantile(block) for block in sample_TC.split(blocks, dim=-1)])
    tap_S = (level / large_S.where(large_S > 0, level).clamp_min(1e-12)).double()
    per_channel = tap_S.repeat_interleave(torch.tensor(blocks, device=tap_S.device)).to(u_BLD.dtype)
    mixer.conv1d.weight[:, 0, -1] = per_channel
    bias = conv_bias(mixer).mul_(per_channel)
    bias[constants] = inverse_silu(bias[constants] / 2)
    tap_x, tap_B, tap_C = tap_S.split([shape.heads, shape.groups, shape.groups])
    return tap_x / 2, 8 / (tap_x * tap_B * tap_C)


def _quantile(values: Tensor) -> Tensor:
    flat = values.abs().flatten()
    return flat.kthvalue(math.ceil(0.999 * flat.numel())).values


def inverse_silu(value: Tensor) -> Tensor:
    """v with silu(v) = value on the increasing branch (v > -1.28), by Newton's method from 2 value."""
    v = (2 * value.double()).clamp_min(-1.0)
    for _ in range(30):
        s = torch.sigmoid(v)
        v = v - (v * s - value) / (s * (1 + v * (1 - s))).clamp_min(1e-3)
    return v.to(value.dtype)


def scale_scan(mixer: Mamba2Mixer, factor_H: Tensor) -> None:
    """Multiplies each head's scan by a factor through dt and D, and leaves its constant decay as it is."""
    dt_H = F.softplus(mixer.dt_bias.double())
    mixer.dt_bias.copy_(inverse_softplus(dt_H * factor_H))
    mixer.A_log.copy_(mixer.A_log.double() - factor_H.log())
    mixer.D.mul_(factor_H)


def fill_norm(mixer: Mamba2Mixer, inputs: Sequence[Tensor], heads: Sequence[Tensor], fill: float = NORM_FILL) -> None:
    """Puts every head's mean square at `fill` x eps before the norm, and at the teacher's after it."""
    tokens = sum(u[..., 0].numel() for u in inputs) * mixer.shape.head_dim
    before_H = torch.stack([head_squares(mixer.gated(u), mixer.shape.heads) for u in inputs]).sum(0) / tokens
    wanted = fill * mixer.shape.eps
    # a head without values says nothing at any scale
    scale_scan(mixer, (wanted / before_H.where(before_H > 0, wanted)).sqrt())
    mixer.norm.weight.fill_(1)
    own_H = torch.stack([head_squares(mixer.features(u), mixer.shape.heads) for u in inputs]).sum(0)
    taught_H = torch.stack([head_squares(o, mixer.shape.heads) for o in heads]).sum(0)
    ratio_H = (taught_H / own_H).where(own_H > 0, 0).sqrt().to(mixer.norm.weight.dtype)
    mixer.norm.weight.mul_(ratio_H.repeat_interleave(mixer.shape.head_dim))


def head_squares(features_BLE: Tensor, heads: int) -> Tensor:
    """Sum of squares of each head, [H], float64."""
    return features_BLE.double().unflatten(-1, (heads, -1)).square().sum((0, 1, 3))
