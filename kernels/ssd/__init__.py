"""State-space duality: the selective scan of Mamba-2, and its one-token step."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import fail
from ..common.dispatch import Backends
from ..common.gpu import refuses_triton
from ..common.native import refuses_native

BACKENDS = Backends(
    "ssd",
    {
        "native": "ssmorph.kernels.ssd.native:ssd_native",
        "chunked": "ssmorph.kernels.ssd.plain:chunked",
        "reference": "ssmorph.kernels.ssd.plain:reference",
        "triton": "ssmorph.kernels.ssd.triton:ssd_triton",
    },
    refuses={"native": refuses_native, "triton": refuses_triton},
    on_gpu="triton",
)
STEPS = Backends(
    "ssd_step",
    {
        "native": "ssmorph.kernels.ssd.native:ssd_step_native",
        "chunked": "ssmorph.kernels.ssd.plain:step",
        "reference": "ssmorph.kernels.ssd.plain:step",
        "triton": "ssmorph.kernels.ssd.triton:ssd_step_triton",
    },
    refuses={"native": refuses_native, "triton": refuses_triton},
    on_gpu="triton",
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
    cu_seqlens: Tensor | None = None,
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
        segment_BL: document of each token, ascending; the state is emptied at each border.
        cu_seqlens: instead of `segment_BL`, for a batch of 1: where documents begin, and the length [documents + 1].
        backend: a name of `BACKENDS`; left out, the best for the device.

    Returns:
        y [B, L, H, P] in the dtype of x, and the last token's state [B, H, P, N] in float32 (float64 for float64).

    Raises:
        ValueError: shapes that disagree, groups that do not divide the heads, an initial state that is not floating
            point, cu_seqlens that do not ascend from 0 to L, an unknown backend or one that cannot run here.
    """
    _check_shapes(x_BLHP, log_a_BLH, B_BLGN, C_BLGN)
    _check_rest(x_BLHP, B_BLGN, w_BLH, D_H, initial_state_BHPN)
    if cu_seqlens is not None:
        segment_BL = documents(cu_seqlens, segment_BL, x_BLHP)
    scan = BACKENDS.load(backend, x_BLHP.device)
    y, state_BHPN = scan(x_BLHP, log_a_BLH, B_BLGN, C_BLGN, w_BLH, D_H, initial_state_BHPN, segment_BL)
    return y, state_BHPN


def ssd_step(
    state_BHPN: Tensor,
    x_BHP: Tensor,
    log_a_BH: Tensor,
    B_BGN: Tensor,
    C_BGN: Tensor,
    *,
    w_BH: Tensor | None = None,
    D_H: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One token of `ssd`, without gradients: updates the state in place and returns y [B, H, P].

    Raises:
        ValueError: a state that is not float32 (float64 for float64 inputs), or an unknown backend.
    """
    work = torch.promote_types(x_BHP.dtype, torch.float32)
    if state_BHPN.dtype != work:
        raise fail("ssd_step.state_BHPN", f"must be {work}", state_BHPN.dtype, "Use the state that ssd returned.")
    y_BHP: Tensor = STEPS.load(backend, x_BHP.device)(state_BHPN, x_BHP, log_a_BH, B_BGN, C_BGN, w_BH, D_H)
    return y_BHP


def documents(cu_seqlens: Tensor, segment_BL: Tensor | None, x_BLHP: Tensor) -> Tensor:
    """The document of each token, [1, L], from where documents begin.

    Raises:
        ValueError: a batch over 1, both forms at once, or starts that do not ascend from 0 to the length.
    """
    batch, length = x_BLHP.shape[:2]
    if segment_BL is not None or batch != 1:
        got = f"batch {batch}" if segment_BL is None else "segment_BL too"
        raise fail("ssd.cu_seqlens", "describes the one row of a batch of 1", got, "Use segment_BL.")
    sizes = cu_seqlens.diff()
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != length or bool((sizes < 0).any()):
        raise fail("ssd.cu_seqlens", f"must ascend from 0 to {length}", cu_seqlens.tolist(), "Sort the documents.")
    return torch.repeat_interleave(torch.arange(len(sizes), device=x_BLHP.device), sizes)[None]


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


def _check_rest(x: Tensor, B: Tensor, w: Tensor | None, D: Tensor | None, initial: Tensor | None) -> None:
    batch, length, heads, width = x.shape
    shapes = {
        "w_BLH": (w, (batch, length, heads)),
        "D_H": (D, (heads,)),
        "initial_state_BHPN": (initial, (batch, heads, width, B.shape[-1])),
    }
    for name, (t, shape) in shapes.items():
        if t is not None and (tuple(t.shape) != shape or not t.is_floating_point()):
            raise fail(
                f"ssd.{name}", f"must be floating point of shape {shape}", (tuple(t.shape), t.dtype), "Check it."
            )
