"""MOHAWK's discrete Mamba-2: no step size, an identity convolution at the start, no norm [MOHAWK, section 3].

in_proj -> [x | B | C | z | a]; log a = -softplus(a + a_bias), weight 1; out_proj(y silu(z + z_bias)). The paper's
form has no a_bias; without one a constant decay, which calibration solves for, could only be approximated.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import MixerShape, ScanMixer

# silu(GATE_OPEN) = 1: a gate that leaves the scan's output as it is
GATE_OPEN = 1.278464542761


class DiscreteMamba2Mixer(ScanMixer):
    """The student of the MOHAWK paper."""

    kind = "discrete_mamba2"
    conv_silu = False

    def __init__(self, shape: MixerShape, layer_idx: int) -> None:
        super().__init__(shape, layer_idx, shape.conv_channels + shape.inner + shape.heads)
        self.z_bias = nn.Parameter(torch.full((shape.inner,), GATE_OPEN))
        self.a_bias = nn.Parameter(torch.zeros(shape.heads))

    def _split(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        channels, z, a = projected.split([self.shape.conv_channels, self.shape.inner, self.shape.heads], dim=-1)
        return z, channels, a

    def _decay(self, decay_BLH: Tensor) -> tuple[Tensor, Tensor | None]:
        return -F.softplus(decay_BLH.float() + self.a_bias.float()), None

    def _finish(self, y_BLE: Tensor, gate_BLE: Tensor) -> Tensor:
        return y_BLE * F.silu(gate_BLE + self.z_bias)
