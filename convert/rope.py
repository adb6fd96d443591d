"""Rotary positions, taken back: queries and keys as they would be if the present token stood at position 0.

RoPE turns channels i and i + R/2 of a head by an angle that grows with the position [Su et al., 2021]; what a query
and a key make of each other depends on the difference alone. A key that leaves the window is always as far behind the
query, so turned back by the query's own angle it is the same wherever in the text it stands: what is learnt of such
keys holds at any length.

B batch, L length, P head width, R turned channels, the first of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# cos and sin of every position, [1 or B, L, R], as transformers hands them to a layer
Tables = tuple[Tensor, Tensor]


def tables_in(kwargs: dict[str, Any]) -> Tables | None:
    """RoPE's tables among the arguments of an attention."""
    return kwargs.get("position_embeddings")


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


def averaged_back(x_BHLP: Tensor, tables: Tables, distances: Tensor) -> Tensor:
    """The mean over `distances`, in tokens, of x turned back by so many positions: fast channels average out.

    Args:
        tables: of at least two positions in a row, which tell the angle per token.
    """
    angles = torch.atan2(tables[1][0, :2].double(), tables[0][0, :2].double())
    turns = torch.outer(distances.double(), angles[1] - angles[0])
    return turned(x_BHLP.double(), turns.cos().mean(0), -turns.sin().mean(0)).to(x_BHLP.dtype)
