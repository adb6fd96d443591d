"""Rotary positions of queries and keys: channels turned, and turned back [Su et al., 2021].

B batch, H heads, L length, P head width, R turned channels, the first of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

# cos and sin of every position, [1 or B, L, R], as transformers hands them to a layer
Tables = tuple[Tensor, Tensor]


def turned(x_BHLP: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channels turned by the angle of these cos and sin, [..., L, R]; those behind the first R stay."""
    part, rest = x_BHLP[..., : cos.shape[-1]], x_BHLP[..., cos.shape[-1] :]
    low, high = part.chunk(2, dim=-1)
    return torch.cat([part * cos + torch.cat([-high, low], dim=-1) * sin, rest], dim=-1)


def turned_back(x_BHLP: Tensor, tables: Tables) -> Tensor:
    """Against the angle of each position; float32. Tables that also scale (YaRN) leave the length as it is."""
    cos, sin = (t.float().unsqueeze(1) for t in tables)
    size = torch.hypot(cos, sin).clamp_min(1e-12)
    return turned(x_BHLP.float(), cos / size, -sin / size)
