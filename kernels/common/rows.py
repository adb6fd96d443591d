"""The launch tables of losses over pairs of tokens: which row of a table two operands take. Does not import triton."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ssmorph.errors import fail

from .gpu import architecture


@dataclass(frozen=True)
class Launch:
    """For widths up to `key`: rows of a tile, warps and pipeline stages."""

    key: int
    rows: int
    warps: int
    stages: int
    # why it need not fit twice on a multiprocessor
    exempt: str = ""


# by architecture and bytes per element; the first row that is wide enough is taken
Launches = Mapping[tuple[str, int], tuple[Launch, ...]]


def row_for(launches: Launches, one: Tensor, other: Tensor, op: str, what: str, do: str) -> Launch:
    """The launch for the wider of two operands.

    Raises:
        ValueError: none is wide enough; `what`, with `{}` for the widest, says of what, and `do` what to do.
    """
    rows, widest = _rows(launches, one, other), _widest(one, other)
    for row in rows:
        if widest <= row.key:
            return row
    rule = f"'triton' holds {what.format(rows[-1].key)} on {architecture(one.device)}"
    raise fail(f"{op}.backend", rule, widest, do)


def too_wide(launches: Launches, one: Tensor, other: Tensor) -> str | None:
    """Why 'triton' cannot hold these widths, or None where it can."""
    most, widest = _rows(launches, one, other)[-1].key, _widest(one, other)
    if widest <= most:
        return None
    return f"triton holds widths up to {most} on {architecture(one.device)}, not {widest}"


def _rows(launches: Launches, one: Tensor, other: Tensor) -> tuple[Launch, ...]:
    return launches[architecture(one.device), min(4, max(one.element_size(), other.element_size()))]


def _widest(one: Tensor, other: Tensor) -> int:
    return max(one.shape[-1], other.shape[-1])
