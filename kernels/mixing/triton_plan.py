"""How the Triton mixing losses are cut, by architecture and width. Does not import triton."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ssmorph.errors import fail

from ..common.gpu import architecture


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
WIDE = Launch(128, 32, 8, 2, "four warps would spill")
HALF_80 = (Launch(64, 32, 4, 2), WIDE)
FULL = (Launch(64, 32, 4, 1), Launch(128, 32, 8, 1))
LAUNCHES = {
    ("sm_90", 2): (Launch(64, 64, 4, 2), WIDE),
    ("sm_80", 2): HALF_80,
    ("gfx942", 2): HALF_80,
    ("sm_90", 4): FULL,
    ("sm_80", 4): FULL,
    ("gfx942", 4): FULL,
}


def row_for(C: Tensor, q: Tensor) -> Launch:
    """The launch for the wider of C and q; raises ValueError where none is wide enough."""
    rows, widest = _rows(C, q), _widest(C, q)
    for row in rows:
        if widest <= row.key:
            return row
    rule = f"'triton' holds widths up to {rows[-1].key} on {architecture(C.device)}"
    raise fail("mixing_loss.backend", rule, widest, "Use backend 'chunked'.")


def too_wide(C: Tensor, q: Tensor) -> str | None:
    """Why 'triton' cannot hold these widths, or None where it can."""
    most, widest = _rows(C, q)[-1].key, _widest(C, q)
    return None if widest <= most else f"triton holds widths up to {most} there, not {widest}"


def _rows(C: Tensor, q: Tensor) -> tuple[Launch, ...]:
    return LAUNCHES[architecture(C.device), min(4, max(C.element_size(), q.element_size()))]


def _widest(C: Tensor, q: Tensor) -> int:
    return max(C.shape[-1], q.shape[-1])
