"""Which layers become which mixer, and what that costs in bytes of cache. Standard library only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import fail

if TYPE_CHECKING:
    from .families import AttentionShape
    from .mixers import MixerShape


def resolve_layers(layers: str | tuple[int, ...], total: int) -> tuple[int, ...]:
    """The layer indices a recipe's `student.layers` means for a model of `total` layers.

    `uniform-K` spreads K converted layers evenly and keeps the first layer whenever K < total.

    Raises:
        ValueError: an index or a count out of range.
    """
    if layers == "all":
        return tuple(range(total))
    if isinstance(layers, str):
        count = int(layers.removeprefix("uniform-"))
        if not 0 <= count <= total:
            raise fail(
                "student.layers",
                f"a {total}-layer model has at most {total} layers to convert",
                layers,
                f"Use 'uniform-{total // 2}'.",
            )
        return tuple(sorted(total - 1 - (index * total) // count for index in range(count)))
    for layer in layers:
        if not 0 <= layer < total:
            raise fail("student.layers", f"a layer must be in 0..{total - 1}", layer, f"The model has {total} layers.")
    return tuple(sorted(layers))


def kv_bytes_per_token(attention: AttentionShape, itemsize: int) -> int:
    """Bytes one token adds to the cache of one attention layer."""
    return 2 * attention.kv_heads * attention.head_dim * itemsize


def kept_bytes_per_token(shape: MixerShape, itemsize: int) -> int:
    """Bytes one token adds to the cache of a mixer: keys and values of the heads that kept heads read."""
    return 2 * len(shape.kept_groups()) * shape.head_dim * itemsize


def cache_bytes(shape: MixerShape, itemsize: int) -> int:
    """Bytes of one mixer's cache: the state in float32, the convolution's last inputs in the model's dtype.

    With a window: its keys and values, and the state of values and mass for each key/value head. With kept heads: that
    of the Mamba-2 heads beside them; their keys and values grow with the text.
    """
    if shape.kept:
        return cache_bytes(shape.beside(), itemsize)
    if shape.window:
        held = 2 * shape.window * shape.groups * shape.head_dim * itemsize
        return held + shape.groups * (shape.head_dim + 1) * shape.state * 4
    return shape.heads * shape.head_dim * shape.state * 4 + (shape.conv_kernel - 1) * shape.conv_channels * itemsize
