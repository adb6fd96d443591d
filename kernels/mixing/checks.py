"""What the arguments of the mixing losses and maps must satisfy. `op` is the function's name, for the errors."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmorph.errors import fail


def check_teacher(op: str, window: int | None, softcap: float | None) -> None:
    """A window of at least the query itself, a positive soft cap."""
    if window is not None and window < 1:
        raise fail(f"{op}.window", "must be at least 1", window, "Use None for full attention.")
    if softcap is not None and not softcap > 0:
        raise fail(f"{op}.softcap", "must be positive", softcap, "Use None for no soft cap.")


def check_shapes(op: str, C: Tensor, B: Tensor, log_a: Tensor, q: Tensor, k: Tensor) -> None:
    """One batch and length, groups that divide the heads, equal widths of what is multiplied."""
    shape = tuple(log_a.shape)
    if len(shape) != 3:
        raise fail(f"{op}.log_a_BLH", "has batch, length and heads", shape, "Give one value per token and head.")
    for name, t in (("C_BLHN", C), ("B_BLHN", B), ("q_BLHK", q), ("k_BLGK", k)):
        if t.ndim != 4 or tuple(t.shape[:2]) != shape[:2] or not t.is_floating_point():
            rule = f"must be floating point [{shape[0]}, {shape[1]}, heads, width] as log_a_BLH is"
            raise fail(f"{op}.{name}", rule, (tuple(t.shape), t.dtype), "Check batch and length.")
        if t.shape[2] == 0 or shape[2] % t.shape[2]:
            rule = f"heads must divide the {shape[2]} heads of log_a_BLH"
            raise fail(f"{op}.{name}", rule, t.shape[2], "Repeat the groups to fit.")
    if C.shape[3] != B.shape[3] or q.shape[3] != k.shape[3]:
        got = (C.shape[3], B.shape[3], q.shape[3], k.shape[3])
        raise fail(op, "C and B, and q and k, must have equal widths", got, "Check C, B, q, k.")


def check_extras(
    op: str, log_a: Tensor, w: Tensor | None, D: Tensor | None, sinks: Tensor | None, valid: Tensor | None
) -> None:
    """What may be left out, in the shape of log_a."""
    batch, length, heads = log_a.shape
    wanted = (
        ("w_BLH", w, (batch, length, heads)),
        ("D_H", D, (heads,)),
        ("sinks_H", sinks, (heads,)),
        ("valid_BL", valid, (batch, length)),
    )
    for name, t, shape in wanted:
        if t is not None and tuple(t.shape) != shape:
            raise fail(f"{op}.{name}", f"must have shape {shape}", tuple(t.shape), "Check it against log_a_BLH.")
    if valid is not None and valid.dtype != torch.bool:
        raise fail(f"{op}.valid_BL", "must be boolean, True at tokens", valid.dtype, "Compare the mask with 0.")
