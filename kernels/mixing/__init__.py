"""Mixing losses: how far the matrix an SSM applies to its inputs is from the teacher's attention matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmorph.errors import fail, nearest

from ..common.dispatch import Backends
from ..common.gpu import refuses_triton
from ..common.native import refuses_native
from .teacher import Teacher

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

__all__ = ["BACKENDS", "LOSSES", "mixing_loss"]


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
    _check_options(loss, window, softcap)
    _check_shapes(C_BLHN, B_BLHN, log_a_BLH, q_BLHK, k_BLGK)
    _check_extras(log_a_BLH, w_BLH, D_H, sinks_H, valid_BL)
    function = BACKENDS.load(backend, C_BLHN.device)
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


def _check_options(loss: str, window: int | None, softcap: float | None) -> None:
    if loss not in LOSSES:
        raise fail("mixing_loss.loss", "must be a known loss", repr(loss), nearest(loss, LOSSES))
    if window is not None and window < 1:
        raise fail("mixing_loss.window", "must be at least 1", window, "Use None for full attention.")
    if softcap is not None and not softcap > 0:
        raise fail("mixing_loss.softcap", "must be positive", softcap, "Use None for no soft cap.")


def _check_shapes(C: Tensor, B: Tensor, log_a: Tensor, q: Tensor, k: Tensor) -> None:
    shape = tuple(log_a.shape)
    if len(shape) != 3:
        raise fail("mixing_loss.log_a_BLH", "has batch, length and heads", shape, "Give one value per token and head.")
    for name, t in (("C_BLHN", C), ("B_BLHN", B), ("q_BLHK", q), ("k_BLGK", k)):
        if t.ndim != 4 or tuple(t.shape[:2]) != shape[:2] or not t.is_floating_point():
            rule = f"must be floating point [{shape[0]}, {shape[1]}, heads, width] as log_a_BLH is"
            raise fail(f"mixing_loss.{name}", rule, (tuple(t.shape), t.dtype), "Check batch and length.")
        if t.shape[2] == 0 or shape[2] % t.shape[2]:
            rule = f"heads must divide the {shape[2]} heads of log_a_BLH"
            raise fail(f"mixing_loss.{name}", rule, t.shape[2], "Repeat the groups to fit.")
    if C.shape[3] != B.shape[3] or q.shape[3] != k.shape[3]:
        got = (C.shape[3], B.shape[3], q.shape[3], k.shape[3])
        raise fail("mixing_loss", "C and B, and q and k, must have equal widths", got, "Check C, B, q, k.")


def _check_extras(
    log_a: Tensor, w: Tensor | None, D: Tensor | None, sinks: Tensor | None, valid: Tensor | None
) -> None:
    batch, length, heads = log_a.shape
    wanted = (
        ("w_BLH", w, (batch, length, heads)),
        ("D_H", D, (heads,)),
        ("sinks_H", sinks, (heads,)),
        ("valid_BL", valid, (batch, length)),
    )
    for name, t, shape in wanted:
        if t is not None and tuple(t.shape) != shape:
            raise fail(f"mixing_loss.{name}", f"must have shape {shape}", tuple(t.shape), "Check it against log_a_BLH.")
    if valid is not None and valid.dtype != torch.bool:
        raise fail("mixing_loss.valid_BL", "must be boolean, True at tokens", valid.dtype, "Compare the mask with 0.")
