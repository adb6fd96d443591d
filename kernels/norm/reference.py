"""The gated group norm as its definition: what the other backends are tested against.

B batch, L length, E = G groups x W channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def norm_reference(y_BLE: Tensor, gate_BLE: Tensor | None, weight_E: Tensor, groups: int, eps: float) -> Tensor:
    """As `gated_group_norm`."""
    work = torch.promote_types(y_BLE.dtype, torch.float32)
    gated_BLE = y_BLE.to(work) if gate_BLE is None else y_BLE.to(work) * F.silu(gate_BLE.to(work))
    gated_BLGW = gated_BLE.unflatten(-1, (groups, -1))
    rms_BLG1 = (gated_BLGW.square().mean(-1, keepdim=True) + eps).sqrt()
    return (weight_E.to(work) * (gated_BLGW / rms_BLG1).flatten(-2)).to(y_BLE.dtype)
