"""How the Triton mixing losses are cut, by architecture and width. Does not import triton."""

from __future__ import annotations

from ..common.rows import Launch

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
