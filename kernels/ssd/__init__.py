"""State-space duality: the selective scan of Mamba-2, and its one-token step."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import fail
from ..common.dispatch import Backends
from ..common.gpu import refuses_triton
from ..common.native import refuses_native
from .checks import INTEGERS, check_inputs, check_optional, check_segment, check_state
from .package import refuses_scan, refuses_step
from .triton_plan import too_wide

BACKENDS = Backends(
    "ssd",
    {
        "native": "ssmorph.kernels.ssd.native:ssd_native",
        "chunked": "ssmorph.kernels.ssd.plain:chunked",
        "reference": "ssmorph.kernels.ssd.plain:reference",
        "triton": "ssmorph.kernels.ssd.triton:ssd_triton",
        "mamba_ssm": "ssmorph.kernels.ssd.package:scan_package",
    },
    refuses={"native": refuses_native, "triton": refuses_triton, "mamba_ssm": refuses_scan},
    on_gpu="triton",
)
STEPS = Backends(
    "ssd_step",
    {
        "native": "ssmorph.kernels.ssd.native:ssd_step_native",
        "chunked": "ssmorph.kernels.ssd.plain:step",
        "reference": "ssmorph.kernels.ssd.plain:step",
        "triton": "ssmorph.kernels.ssd.triton:ssd_step_triton",
        "mamba_ssm": "ssmorph.kernels.ssd.package:step_package",
    },
    refuses={"native": refuses_native, "triton": refuses_triton, "mamba_ssm": refuses_step},
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
        backend: a name of `BACKENDS`; left out, the best for the device and these widths. 'mamba_ssm' (the package
            mamba-ssm, on a GPU) runs when asked for alone.

    Returns:
        y [B, L, H, P] in the dtype of x, and the last token's state [B, H, P, N] in float32 (float64 for float64).

    Raises:
        ValueError: shapes that disagree, tensors that are not floating point, no token at all, groups that do not
            divide the heads, cu_seqlens that do not ascend from 0 to L, an unknown backend or one that cannot run here.
    """
    check_inputs("ssd", ("x_BLHP", "log_a_BLH", "B_BLGN", "C_BLGN"), x_BLHP, log_a_BLH, B_BLGN, C_BLGN)
    batch, length, heads, width = x_BLHP.shape
    check_optional("ssd", "w_BLH", w_BLH, (batch, length, heads))
    check_optional("ssd", "D_H", D_H, (heads,))
    check_optional("ssd", "initial_state_BHPN", initial_state_BHPN, (batch, heads, width, B_BLGN.shape[-1]))
    check_segment("ssd", segment_BL, (batch, length))
    if cu_seqlens is not None:
        segment_BL = documents(cu_seqlens, segment_BL, x_BLHP)
    narrow = too_wide(x_BLHP.device, x_BLHP.dtype, max(width, B_BLGN.shape[-1]))
    scan = BACKENDS.load(backend, x_BLHP.device, {"triton": narrow})
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
        ValueError: as `ssd`, and a state that is not float32 (float64 for float64 inputs).
    """
    check_inputs("ssd_step", ("x_BHP", "log_a_BH", "B_BGN", "C_BGN"), x_BHP, log_a_BH, B_BGN, C_BGN)
    check_optional("ssd_step", "w_BH", w_BH, tuple(log_a_BH.shape))
    check_optional("ssd_step", "D_H", D_H, (x_BHP.shape[1],))
    check_state("ssd_step", state_BHPN, x_BHP, B_BGN)
    y_BHP: Tensor = STEPS.load(backend, x_BHP.device)(state_BHPN, x_BHP, log_a_BH, B_BGN, C_BGN, w_BH, D_H)
    return y_BHP


def documents(cu_seqlens: Tensor, segment_BL: Tensor | None, x_BLHP: Tensor) -> Tensor:
    """The document of each token, [1, L], from where documents begin.

    Raises:
        ValueError: a batch over 1, both forms at once, or integers that do not ascend from 0 to the length.
    """
    batch, length = x_BLHP.shape[:2]
    if segment_BL is not None or batch != 1:
        also = f"batch {batch}" if segment_BL is None else "segment_BL too"
        raise fail("ssd.cu_seqlens", "describes the one row of a batch of 1", also, "Use segment_BL.")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in INTEGERS:
        rule, got = "must be integers [documents + 1]", (tuple(cu_seqlens.shape), cu_seqlens.dtype)
        raise fail("ssd.cu_seqlens", rule, got, "Give where documents begin, and the length.")
    sizes = cu_seqlens.diff()
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != length or bool((sizes < 0).any()):
        raise fail("ssd.cu_seqlens", f"must ascend from 0 to {length}", cu_seqlens.tolist(), "Sort the documents.")
    return torch.repeat_interleave(torch.arange(len(sizes), device=x_BLHP.device), sizes)[None]
