"""The scans that know neither groups, weights nor D: what `ssd` is asked, put as they expect it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .chunked import ssd_chunked
from .reference import ssd_reference

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


def chunked(*arguments: Tensor | None) -> tuple[Tensor, Tensor]:
    """`ssd` by chunked.py."""
    return _prepared(ssd_chunked, *arguments)  # type: ignore[arg-type]


def reference(*arguments: Tensor | None) -> tuple[Tensor, Tensor]:
    """`ssd` by reference.py."""
    return _prepared(ssd_reference, *arguments)  # type: ignore[arg-type]


def _prepared(
    scan: Scan,
    x_BLHP: Tensor,
    log_a_BLH: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    w_BLH: Tensor | None,
    D_H: Tensor | None,
    state_BHPN: Tensor | None,
    segment_BL: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, _, heads, width = x_BLHP.shape
    work = torch.promote_types(x_BLHP.dtype, torch.float32)
    x = x_BLHP.to(work)
    weighted = x if w_BLH is None else x * w_BLH.to(work).unsqueeze(-1)
    repeat = heads // B_BLGN.shape[2]
    B, C = (t.to(work).repeat_interleave(repeat, dim=2) if repeat > 1 else t.to(work) for t in (B_BLGN, C_BLGN))
    if state_BHPN is None:
        state_BHPN = x.new_zeros(batch, heads, width, B.shape[-1])
    y, final_BHPN = scan(weighted, log_a_BLH.to(work), B, C, state_BHPN.to(work), segment_BL)
    if D_H is not None:
        y = y + D_H.to(work).unsqueeze(-1) * x
    return y.to(x_BLHP.dtype), final_BHPN


def step(
    state_BHPN: Tensor, x_BHP: Tensor, log_a_BH: Tensor, B_BGN: Tensor, C_BGN: Tensor, w_BH: Tensor | None,
    D_H: Tensor | None,
) -> Tensor:  # fmt: skip
    """`ssd_step` as its definition."""
    repeat = x_BHP.shape[1] // B_BGN.shape[1]
    B, C = (t.to(state_BHPN.dtype).repeat_interleave(repeat, dim=1) for t in (B_BGN, C_BGN))
    x = x_BHP.to(state_BHPN.dtype)
    weighted = x if w_BH is None else x * w_BH.to(x.dtype).unsqueeze(-1)
    state_BHPN.mul_(log_a_BH.to(x.dtype).exp()[..., None, None]).addcmul_(weighted.unsqueeze(-1), B.unsqueeze(-2))
    y_BHP = (state_BHPN @ C.unsqueeze(-1)).squeeze(-1)
    if D_H is not None:
        y_BHP = y_BHP + D_H.to(x.dtype).unsqueeze(-1) * x
    return y_BHP.to(x_BHP.dtype)
