"""RMS norm over groups of channels after a SiLU gate, as the stock Mamba-2 mixer has it [Mamba-2, section 7.1]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import fail


def gated_group_norm(y_BLE: Tensor, gate_BLE: Tensor | None, weight_E: Tensor, *, groups: int, eps: float) -> Tensor:
    """weight * RMSNorm_group(y * silu(gate)) over E = groups x width channels, computed in float32; [B, L, E].

    Raises:
        ValueError: groups that do not divide the channels.
    """
    if y_BLE.shape[-1] % groups:
        raise fail(
            "gated_group_norm.groups", f"must divide the {y_BLE.shape[-1]} channels", groups, "Use the SSM's groups."
        )
    work = torch.promote_types(y_BLE.dtype, torch.float32)
    gated = y_BLE.to(work) if gate_BLE is None else y_BLE.to(work) * F.silu(gate_BLE.to(work))
    grouped = gated.unflatten(-1, (groups, -1))
    scaled = grouped * torch.rsqrt(grouped.pow(2).mean(-1, keepdim=True) + eps)
    return (weight_E * scaled.flatten(-2)).to(y_BLE.dtype)
