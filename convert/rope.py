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

from ssmorph.kernels.common.rope import Tables, turned


def tables_in(kwargs: dict[str, Any]) -> Tables | None:
    """RoPE's tables among the arguments of an attention."""
    return kwargs.get("position_embeddings")


def averaged_back(x_BHLP: Tensor, tables: Tables, distances: Tensor) -> Tensor:
    """The mean over `distances`, in tokens, of x turned back by so many positions: fast channels average out.

    Args:
        tables: of at least two positions in a row, which tell the angle per token.
    """
    angles = torch.atan2(tables[1][0, :2].double(), tables[0][0, :2].double())
    turns = torch.outer(distances.double(), angles[1] - angles[0])
    return turned(x_BHLP.double(), turns.cos().mean(0), -turns.sin().mean(0)).to(x_BHLP.dtype)
