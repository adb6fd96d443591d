"""How the Triton scan is cut: tiles, warps and stages by architecture, sections of a sequence, and what a launch needs.

P head width, N state width, S sections of the sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssmorph.errors import fail

from ..common.gpu import architecture, precision

# programs wanted per multiprocessor before a sequence is left whole, and the fewest chunks worth a section
FILL, SHORTEST = 2, 8


@dataclass(frozen=True)
class Launch:
    """For widths up to `key`: tokens of a chunk, tile of the output's width, warps, pipeline stages."""

    key: int
    chunk: int
    tile: int
    warps: int
    stages: int
    # why it need not fit twice on a multiprocessor
    exempt: str = ""


# by architecture and bytes per element; the first row that is wide enough is taken
HALF_90 = (Launch(64, 64, 64, 4, 2), Launch(128, 64, 32, 4, 2), Launch(256, 64, 16, 8, 2, "wider than 128"))
HALF_80 = (Launch(64, 64, 32, 4, 2), Launch(128, 64, 16, 8, 2, "four warps would spill"))
FULL = (Launch(64, 32, 32, 4, 1), Launch(128, 32, 16, 8, 1))
LAUNCHES = {
    ("sm_90", 2): HALF_90,
    ("sm_80", 2): HALF_80,
    ("gfx942", 2): HALF_80,
    ("sm_90", 4): FULL,
    ("sm_80", 4): FULL,
    ("gfx942", 4): FULL,
}


def sections_of(programs: int, chunks: int, device: torch.device) -> int:
    """Into how many sections sequences are cut so that every multiprocessor has work."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    return max(1, min(FILL * processors // max(programs, 1), chunks // SHORTEST))


@dataclass(frozen=True)
class Plan:
    """What all launches of one scan share."""

    batch: int
    length: int
    heads: int
    group: int
    P: int
    N: int
    chunks: int
    sections: int
    launch: Launch
    precision: str

    @classmethod
    def of(cls, x: Tensor, B: Tensor) -> Plan:
        batch, length, heads, P = x.shape
        row = row_for(x.device, x.dtype, max(P, B.shape[-1]))
        total = -(-length // row.chunk)
        chunks = -(-total // sections_of(batch * heads * -(-P // row.tile), total, x.device))
        return cls(
            batch=batch, length=length, heads=heads, group=heads // B.shape[2], P=P, N=B.shape[-1],
            chunks=chunks, sections=-(-total // chunks), launch=row, precision=precision(x.device, x),
        )  # fmt: skip

    @property
    def size(self) -> str:
        """For tables."""
        return f"P={self.P} N={self.N}"

    def local(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Where the sections' own states and their decays go."""
        shape = (self.batch, self.heads, self.sections)
        return x.new_empty(*shape, self.P, self.N, dtype=torch.float32), x.new_empty(*shape, dtype=torch.float32)


def row_for(device: torch.device, dtype: torch.dtype, widest: int) -> Launch:
    """The launch for the wider of P and N; raises ValueError where none is wide enough."""
    arch = architecture(device)
    rows = LAUNCHES[arch, dtype.itemsize]
    for row in rows:
        if widest <= row.key:
            return row
    rule = f"'triton' holds widths up to {rows[-1].key} of {dtype} on {arch}"
    raise fail("ssd.backend", rule, widest, "Use backend 'chunked'.")


def too_wide(device: torch.device, dtype: torch.dtype, widest: int) -> str | None:
    """Why 'triton' cannot hold the wider of P and N, or None where it can."""
    arch = architecture(device)
    most = LAUNCHES[arch, min(4, dtype.itemsize)][-1].key
    return None if widest <= most else f"triton holds widths up to {most} of {dtype} on {arch}, not {widest}"


def block(width: int) -> int:
    """The power of two that holds a width; products need at least 16."""
    return max(16, 1 << (width - 1).bit_length())


@dataclass(frozen=True)
class Shape:
    """How a walk that contracts N (`wide_state`) or P is tiled; `state` are the strides of its key and value."""

    widths: dict[str, Any]
    options: dict[str, Any]
    tiles: int
    state: tuple[int, int]

    @classmethod
    def of(cls, plan: Plan, wide_state: bool) -> Shape:
        key, value = (plan.N, plan.P) if wide_state else (plan.P, plan.N)
        row = plan.launch
        tile = min(row.tile, block(value))
        widths = {
            "K": key,
            "V": value,
            "BLOCK_K": block(key),
            "BLOCK_V": tile,
            "Q": row.chunk,
            "PRECISION": plan.precision,
        }
        options = {"warps": row.warps, "stages": row.stages, "exempt": row.exempt}
        return cls(widths, options, -(-value // tile), (1, plan.N) if wide_state else (plan.N, 1))
