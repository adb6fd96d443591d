"""How the Triton relation loss is cut, by architecture and width of a relation head. Does not import triton."""

from __future__ import annotations

from ..common.rows import Launch

# by architecture and bytes per element; the first row that is wide enough is taken
HALF = (Launch(64, 64, 4, 2), Launch(128, 32, 4, 2))
HALF_AMD = (Launch(128, 32, 4, 2),)
FULL = (Launch(128, 16, 4, 1),)
LAUNCHES = {
    ("sm_90", 2): HALF,
    ("sm_80", 2): HALF,
    ("gfx942", 2): HALF_AMD,
    ("sm_90", 4): FULL,
    ("sm_80", 4): FULL,
    ("gfx942", 4): FULL,
}
