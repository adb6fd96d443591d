"""The same values as views of other memory, for whatever reads by address."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def apart(t: Tensor) -> Tensor:
    """Every second element of a tensor of NaN (of integers: of zeros), in every dimension."""
    wide = t.new_full([2 * n + 1 for n in t.shape], float("nan") if t.is_floating_point() else 0)
    inner = wide[tuple(slice(1, None, 2) for _ in t.shape)]
    return inner.copy_(t)


def turned(t: Tensor) -> Tensor:
    """The dimensions stored in the opposite order."""
    order = tuple(reversed(range(t.ndim)))
    return t.permute(order).contiguous().permute(order)


def backwards(t: Tensor) -> Tensor:
    """The last two dimensions stored the other way round, as in a convolution's output."""
    return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.ndim > 1 else t


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {"apart": apart, "turned": turned, "backwards": backwards}
