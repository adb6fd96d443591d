"""State-space duality: the selective scan of Mamba-2, and its one-token step."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import fail
from ..common.dispatch import Backends

BACKENDS = Backends(
    "ssd",
    {"chunked": "ssmorph.kernels.ssd.chunked:ssd_chunked", "reference": "ssmorph.kernels.ssd.reference:ssd_reference"},
)


def ssd(
    x_BLHP: Tensor,
    log_a_BLH: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    *,
    w_BLH: Tensor | None = None,
    D_H: Tensor | None = None,
    initial_state_BHPN: Tensor | None = None,
    segment_BL: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = S_t C_t + D x_t, S_t = exp(log_a_t) S_{t-1} + w_t x_t B_t^T; y and the final state [Mamba-2, eq. 1 and 6].

    Args:
        x_BLHP: inputs; B batch, L length, H heads, P head width.
        log_a_BLH: log of the decay per token and head, at most 0.
        B_BLGN, C_BLGN: write and read vectors; head h uses group h // (H / G).
        w_BLH: weight of each token's write (dt in Mamba-2); 1 where left out.
        D_H: skip connection per head.
        initial_state_BHPN: state before the first token; zero where left out.
        segment_BL: document of each token; the state is emptied at each border.
        backend: a name of `BACKENDS`; left out, the best for the device.

    Returns:
        y [B, L, H, P] in the dtype of x, and the last token's state [B, H, P, N] in float32 (float64 for float64).

    Raises:
        ValueError: shapes that disagree, groups that do not divide the heads, an unknown backend.
    """
    batch, _, heads, width = x_BLHP.shape
    _check_shapes(x_BLHP, log_a_BLH, B_BLGN, C_BLGN)
    scan = BACKENDS.load(backend, x_BLHP.device)
    work = torch.promote_types(x_BLHP.dtype, torch.float32)
    x = x_BLHP.to(work)
    weighted = x if w_BLH is None else x * w_BLH.to(work).unsqueeze(-1)
    repeat = heads // B_BLGN.shape[2]
    B, C = (t.to(work).repeat_interleave(repeat, dim=2) if repeat > 1 else t.to(work) for t in (B_BLGN, C_BLGN))
    if initial_state_BHPN is None:
        initial_state_BHPN = x.new_zeros(batch, heads, width, B.shape[-1])
    y, state_BHPN = scan(weighted, log_a_BLH.to(work), B, C, initial_state_BHPN.to(work), segment_BL)
    if D_H is not None:
        y = y + D_H.to(work).unsqueeze(-1) * x
    return y.to(x_BLHP.dtype), state_BHPN


def ssd_step(
    state_BHPN: Tensor,
    x_BHP: Tensor,
    log_a_BH: Tensor,
    B_BGN: Tensor,
    C_BGN: Tensor,
    *,
    w_BH: Tensor | None = None,
    D_H: Tensor | None = None,
) -> Tensor:
    """One token of `ssd`: updates the state in place and returns y [B, H, P]."""
    repeat = x_BHP.shape[1] // B_BGN.shape[1]
    B, C = (t.to(state_BHPN.dtype).repeat_interleave(repeat, dim=1) for t in (B_BGN, C_BGN))
    x = x_BHP.to(state_BHPN.dtype)
    weighted = x if w_BH is None else x * w_BH.to(x.dtype).unsqueeze(-1)
    state_BHPN.mul_(log_a_BH.to(x.dtype).exp()[..., None, None]).addcmul_(weighted.unsqueeze(-1), B.unsqueeze(-2))
    y_BHP = (state_BHPN @ C.unsqueeze(-1)).squeeze(-1)
    if D_H is not None:
        y_BHP = y_BHP + D_H.to(x.dtype).unsqueeze(-1) * x
    return y_BHP.to(x_BHP.dtype)


def _check_shapes(x: Tensor, log_a: Tensor, B: Tensor, C: Tensor) -> None:
    if log_a.shape != x.shape[:3]:
        raise fail(
            "ssd.log_a_BLH",
            f"must have shape {tuple(x.shape[:3])}, as x",
            tuple(log_a.shape),
            "Give one value per token and head.",
        )
    if B.shape != C.shape or B.shape[:2] != x.shape[:2]:
        raise fail(
            "ssd.B_BLGN",
            "B and C have one shape and the batch and length of x",
            (tuple(B.shape), tuple(C.shape)),
            "Check both.",
        )
    if x.shape[2] % B.shape[2]:
        raise fail("ssd.B_BLGN", f"groups must divide the {x.shape[2]} heads", B.shape[2], "Repeat the groups to fit.")
