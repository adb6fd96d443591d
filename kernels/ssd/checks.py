"""What the arguments of the scan and of its step must satisfy. `op` is the function's name, for the errors."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import fail

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_inputs(op: str, names: tuple[str, str, str, str], x: Tensor, log_a: Tensor, B: Tensor, C: Tensor) -> None:
    """Of x [..., H, P], log_a [..., H], B and C [..., G, N], whose names say what stands before the heads."""
    _check_rank(f"{op}.{names[0]}", x, names[0])
    lead, heads = tuple(x.shape[:-2]), x.shape[-2]
    if x.numel() == 0:
        raise fail(f"{op}.{names[0]}", "needs a token, a head and a channel", tuple(x.shape), "Leave out empty calls.")
    check_optional(op, names[1], log_a, (*lead, heads))
    for name, t in zip(names[2:], (B, C), strict=True):
        _check_rank(f"{op}.{name}", t, name)
        if tuple(t.shape[:-2]) != lead:
            rule = f"must begin with {lead}, as {names[0]} does"
            raise fail(f"{op}.{name}", rule, tuple(t.shape), "Give each token its vector.")
        if t.shape[-1] == 0 or t.shape[-2] == 0 or heads % t.shape[-2]:
            rule = f"groups must divide the {heads} heads"
            raise fail(f"{op}.{name}", rule, tuple(t.shape[-2:]), "Repeat the groups to fit.")
    if B.shape != C.shape:
        rule = f"must have shape {tuple(B.shape)}, as {names[2]}"
        raise fail(f"{op}.{names[3]}", rule, tuple(C.shape), "Check both.")


def check_optional(op: str, name: str, t: Tensor | None, shape: tuple[int, ...]) -> None:
    """Floating point of one shape, where it is there."""
    if t is not None and (tuple(t.shape) != shape or not t.is_floating_point()):
        rule, got = f"must be floating point of shape {shape}", (tuple(t.shape), t.dtype)
        raise fail(f"{op}.{name}", rule, got, "Check it against x.")


def check_segment(op: str, segment_BL: Tensor | None, shape: tuple[int, ...]) -> None:
    """An integer for each token; that they ascend is not looked at, since a GPU would be waited for."""
    if segment_BL is not None and (tuple(segment_BL.shape) != shape or segment_BL.dtype not in INTEGERS):
        rule, got = f"must be integers of shape {shape}", (tuple(segment_BL.shape), segment_BL.dtype)
        raise fail(f"{op}.segment_BL", rule, got, "Give the document of each token.")


def check_state(op: str, state_BHPN: Tensor, x_BHP: Tensor, B_BGN: Tensor) -> None:
    """A step's state, which it writes to: the shape of x and B, the dtype that sums are taken in."""
    work = torch.promote_types(x_BHP.dtype, torch.float32)
    shape = (*x_BHP.shape, B_BGN.shape[-1])
    if state_BHPN.dtype != work or tuple(state_BHPN.shape) != shape:
        rule, got = f"must be {work} of shape {shape}", (tuple(state_BHPN.shape), state_BHPN.dtype)
        raise fail(f"{op}.state_BHPN", rule, got, "Use the state that ssd returned.")


def _check_rank(where: str, t: Tensor, name: str) -> None:
    dims = name.rsplit("_", 1)[1]
    if t.ndim != len(dims) or not t.is_floating_point():
        rule, got = f"must be floating point [{', '.join(dims)}]", (tuple(t.shape), t.dtype)
        raise fail(where, rule, got, "Keep one dimension for each letter of its name.")
