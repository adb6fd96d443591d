"""Maps of a head as PNG images inside the page: positive values blue, negative ones orange, nothing transparent."""

from __future__ import annotations

import base64
import struct
import zlib
from html import escape
from typing import Any

from .elements import Html

# matrices.ABSENT, which would import torch
ABSENT = -128
POSITIVE, NEGATIVE = (38, 112, 214), (222, 110, 24)


def map_image(picture: dict[str, Any], label: str) -> Html:
    """An image of what `matrices.picture` wrote; the square root of a value decides how strongly it is painted."""
    side, cells = picture["size"], base64.b64decode(picture["cells"])
    signed = [c - 256 if c > 127 else c for c in cells]
    pixels = b"".join(_pixel(c) for c in signed)
    data = base64.b64encode(png(side, side, pixels)).decode()
    return Html(f'<img class="map" alt="{escape(label)}" src="data:image/png;base64,{data}">')


def _pixel(cell: int) -> bytes:
    if cell == ABSENT:
        return bytes(4)
    strength = (abs(cell) / 127) ** 0.5
    # a faint ground shows where a value could be
    return bytes((*(POSITIVE if cell >= 0 else NEGATIVE), round(16 + 239 * strength)))


def png(width: int, height: int, pixels: bytes) -> bytes:
    """A PNG file of 8-bit RGBA pixels, row by row."""
    rows = b"".join(b"\0" + pixels[4 * width * y : 4 * width * (y + 1)] for y in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
