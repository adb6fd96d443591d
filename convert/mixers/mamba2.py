"""The stock Mamba-2 mixer, parameter for parameter as transformers, vLLM and llama.cpp run it [Mamba-2, figure 6 left].

in_proj -> [z | x | B | C | dt]; causal convolution with bias and SiLU over [x | B | C]; dt = softplus(dt + dt_bias),
log a = -dt exp(A_log); out_proj(RMSNorm_group(y silu(z))). No RoPE, no norm on B or C, no clamp on dt.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmorph.kernels.norm import gated_group_norm

from .base import MixerShape, ScanMixer


class GatedNorm(nn.Module):
    """The norm, its weight under the name stock checkpoints use."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, y_BLE: Tensor, gate_BLE: Tensor, groups: int, eps: float) -> Tensor:
        """RMSNorm_group(y silu(z)), [B, L, E]."""
        return gated_group_norm(y_BLE, gate_BLE, self.weight, groups=groups, eps=eps)


class Mamba2Mixer(ScanMixer):
    """The default student."""

    kind = "mamba2"
    conv_silu = True

    def __init__(self, shape: MixerShape, layer_idx: int) -> None:
        super().__init__(shape, layer_idx, shape.inner + shape.conv_channels + shape.heads)
        self.dt_bias = nn.Parameter(torch.zeros(shape.heads))
        self.A_log = nn.Parameter(torch.zeros(shape.heads))
        self.norm = GatedNorm(shape.inner)

    def _split(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, channels, dt = projected.split([self.shape.inner, self.shape.conv_channels, self.shape.heads], dim=-1)
        return z, channels, dt

    def _decay(self, decay_BLH: Tensor) -> tuple[Tensor, Tensor | None]:
        dt_BLH = F.softplus(decay_BLH.float() + self.dt_bias.float())
        return -dt_BLH * self.A_log.float().exp(), dt_BLH

    def _finish(self, y_BLE: Tensor, gate_BLE: Tensor) -> Tensor:
        return self.norm(y_BLE, gate_BLE, self.shape.groups, self.shape.eps)

    def gated(self, hidden_BLD: Tensor) -> Tensor:
        """The scan's output times silu(z), before the norm; [B, L, E]."""
        gate, channels, dt = self._split(self.in_proj(hidden_BLD))
        return self._scan(channels, dt, None, None, None).flatten(-2) * F.silu(gate)
