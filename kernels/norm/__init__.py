"""RMS norm over groups of channels after a SiLU gate, as the stock Mamba-2 mixer has it [Mamba-2, section 7.1]."""

from __future__ import annotations

from torch import Tensor

from ssmorph.errors import fail

from ..common.dispatch import Backends
from ..common.gpu import refuses_triton

BACKENDS = Backends(
    "gated_group_norm",
    {
        "chunked": "ssmorph.kernels.norm.chunked:norm_chunked",
        "reference": "ssmorph.kernels.norm.reference:norm_reference",
        "triton": "ssmorph.kernels.norm.triton:norm_triton",
    },
    refuses={"triton": refuses_triton},
    on_gpu="triton",
)


def gated_group_norm(
    y_BLE: Tensor, gate_BLE: Tensor | None, weight_E: Tensor, *, groups: int, eps: float, backend: str | None = None
) -> Tensor:
    """weight * RMSNorm_group(y * silu(gate)) over E = groups x width channels; [B, L, E] in the dtype of y.

    Computed in float32 (float64 for float64). Without a gate y itself is normalised.

    Args:
        backend: a name of `BACKENDS`; left out, the best for the device.

    Raises:
        ValueError: groups that do not divide the channels, a gate or a weight of another shape, an unknown backend or
            one that cannot run here.
    """
    if y_BLE.ndim != 3 or not y_BLE.is_floating_point():
        rule, came = "must be floating point [B, L, E]", (tuple(y_BLE.shape), y_BLE.dtype)
        raise fail("gated_group_norm.y_BLE", rule, came, "Put the channels last.")
    channels = y_BLE.shape[-1]
    if groups < 1 or channels % groups:
        raise fail("gated_group_norm.groups", f"must divide the {channels} channels", groups, "Use the SSM's groups.")
    if gate_BLE is not None and gate_BLE.shape != y_BLE.shape:
        rule, got = f"must have shape {tuple(y_BLE.shape)}, as y", tuple(gate_BLE.shape)
        raise fail("gated_group_norm.gate_BLE", rule, got, "Give one value per channel and token.")
    if tuple(weight_E.shape) != (channels,):
        rule = f"needs {channels} channels"
        raise fail("gated_group_norm.weight_E", rule, tuple(weight_E.shape), "Give one value per channel.")
    out_BLE: Tensor = BACKENDS.load(backend, y_BLE.device)(y_BLE, gate_BLE, weight_E, groups, eps)
    return out_BLE
