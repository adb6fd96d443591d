"""Mixing losses and maps: the matrix an SSM applies to its inputs against the teacher's attention matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmorph.errors import fail, nearest

from ..common.dispatch import Backends
from ..common.gpu import refuses_triton
from ..common.native import refuses_native
from ..common.rows import too_wide
from .checks import check_extras, check_shapes, check_teacher
from .maps import mixing_maps
from .teacher import Teacher
from .triton_plan import LAUNCHES

BACKENDS = Backends(
    "mixing_loss",
    {
        "native": "ssmorph.kernels.mixing.native:mixing_native",
        "chunked": "ssmorph.kernels.mixing.plain:chunked",
        "triton": "ssmorph.kernels.mixing.triton:mixing_triton",
        "reference": "ssmorph.kernels.mixing.plain:reference",
    },
    refuses={"native": refuses_native, "triton": refuses_triton},
    on_gpu="triton",
)
LOSSES = ("cosine", "frobenius")

__all__ = ["BACKENDS", "LOSSES", "mixing_loss", "mixing_maps"]


def mixing_loss(
    C_BLHN: Tensor,
    B_BLHN: Tensor,
    log_a_BLH: Tensor,
    q_BLHK: Tensor,
    k_BLGK: Tensor,
    *,
    w_BLH: Tensor | None = None,
    D_H: Tensor | None = None,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    valid_BL: Tensor | None = None,
    loss: str = "cosine",
    per_head: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Distance of M[t,s] = (C_t . B_s) exp(sum_{k=s+1..t} log a_k) w_s + D [t=s] to causal attention A [MOHAWK, eq. 6].

    `frobenius` is the mean over batch and head of the norm of M_h - A_h, `cosine` the mean over rows of 1 - cos(M_h[t],
    A_h[t]), where a row of zeros has cosine 0. Gradients go to C, B, log_a, w and D; the teacher's side gets none.
    Computed in float32 (float64 for float64); 'triton' multiplies half-precision inputs as they are. Whatever stands at
    padded tokens has no influence and gets gradient 0.

    Args:
        C_BLHN, B_BLHN: read and write vectors; fewer groups than H are repeated, head h using group h // (H / groups).
        log_a_BLH: log of the decay per token and head, at most 0.
        q_BLHK, k_BLGK: the teacher's queries and keys after the position encoding; head h uses key head h // (H / G).
        w_BLH: weight of each token's write (dt in Mamba-2); 1 where left out.
        D_H: skip connection per head; 0 where left out.
        scale: factor of the teacher's scores.
        window: sliding window of the teacher, in tokens with the query itself counted.
        softcap: soft cap of the teacher's scores.
        sinks_H: logit of an attention sink per head.
        valid_BL: False at padded tokens: their rows do not count, their columns are masked, and they neither decay nor
            write.
        loss: 'cosine' or 'frobenius'.
        per_head: return one value per head [H]; their mean is the loss.
        backend: a name of `BACKENDS`; left out, SSMORPH_BACKEND or the best for the device.

    Returns:
        A scalar, or [H] where per_head, in float32 (float64 for float64).

    Raises:
        ValueError: shapes that disagree, groups that do not divide the heads, an unknown loss or backend, a window
            below 1 or a soft cap that is not positive.
    """
    op = "mixing_loss"
    if loss not in LOSSES:
        raise fail(f"{op}.loss", "must be a known loss", repr(loss), nearest(loss, LOSSES))
    check_teacher(op, window, softcap)
    check_shapes(op, C_BLHN, B_BLHN, log_a_BLH, q_BLHK, k_BLGK)
    check_extras(op, log_a_BLH, w_BLH, D_H, sinks_H, valid_BL)
    function = BACKENDS.load(backend, C_BLHN.device, {"triton": too_wide(LAUNCHES, C_BLHN, q_BLHK)})
    work = torch.promote_types(C_BLHN.dtype, torch.float32)
    heads = log_a_BLH.shape[2]
    C, B, q, k = (_per_head(t, heads) for t in (C_BLHN, B_BLHN, q_BLHK.detach(), k_BLGK.detach()))
    log_a = log_a_BLH.to(work)
    w = torch.ones_like(log_a) if w_BLH is None else w_BLH.to(work)
    D = log_a.new_zeros(heads) if D_H is None else D_H.to(work)
    if valid_BL is not None:
        hide = ~valid_BL[..., None]
        log_a, w = log_a.masked_fill(hide, 0), w.masked_fill(hide, 0)
        C, B, q, k = (t.masked_fill(hide[..., None], 0) for t in (C, B, q, k))
    sinks = None if sinks_H is None else sinks_H.detach().to(work)
    with torch.autocast(C.device.type, enabled=False):
        loss_H: Tensor = function(C, B, log_a, w, D, Teacher(q, k, scale, window, softcap, sinks), valid_BL, loss)
    return loss_H if per_head else loss_H.mean()


def _per_head(t_BLGN: Tensor, heads: int) -> Tensor:
    repeat = heads // t_BLGN.shape[2]
    return t_BLGN.repeat_interleave(repeat, dim=2) if repeat > 1 else t_BLGN
