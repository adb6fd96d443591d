"""The mixers' operations over the torch implementations alone: what a bundle defines in the place of `ssmorph.kernels`.

Same names and meanings as `ssd`, `causal_conv` and `gated_group_norm` there, without their checks and their choice of
a backend. B batch, L length, C channels, K width, H heads, P head width, G groups, N state width, E channels.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ssmorph.kernels.conv.chunked import conv_chunked, step_chunked
from ssmorph.kernels.norm.chunked import norm_chunked
from ssmorph.kernels.ssd.plain import chunked, step
from ssmorph.kernels.window_step.plain import Far, Held, window_step_chunked


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
) -> tuple[Tensor, Tensor]:
    """The selective scan: y and the final state."""
    return chunked(x_BLHP, log_a_BLH, B_BLGN, C_BLGN, w_BLH, D_H, initial_state_BHPN, segment_BL)


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
    """One token of `ssd`; updates the state in place."""
    return step(state_BHPN, x_BHP, log_a_BH, B_BGN, C_BGN, w_BH, D_H)


def causal_conv(
    x_BLC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None = None,
    *,
    silu: bool = False,
    past_BKC: Tensor | None = None,
    segment_BL: Tensor | None = None,
) -> Tensor:
    """Causal depthwise convolution, then SiLU where asked."""
    return conv_chunked(x_BLC, weight_CK, bias_C, silu, past_BKC, segment_BL)


def causal_conv_step(
    past_BKC: Tensor, x_BC: Tensor, weight_CK: Tensor, bias_C: Tensor | None = None, *, silu: bool = False
) -> Tensor:
    """One token of `causal_conv`; shifts the past in place."""
    return step_chunked(past_BKC, x_BC, weight_CK, bias_C, silu)


def gated_group_norm(y_BLE: Tensor, gate_BLE: Tensor, weight_E: Tensor, *, groups: int, eps: float) -> Tensor:
    """weight * RMSNorm_group(y * silu(gate))."""
    return norm_chunked(y_BLE, gate_BLE, weight_E, groups, eps)


def window_step(
    held: Held,
    q_BHP: Tensor,
    k_BGP: Tensor,
    v_BGP: Tensor,
    *,
    valid_B: Tensor | None = None,
    scale: float,
    softcap: float | None = None,
    far: Far | None = None,
) -> tuple[Tensor, Held, Tensor | None]:
    """One token beside a window and a state."""
    return window_step_chunked(held, q_BHP, k_BGP, v_BGP, valid_B, scale, softcap, far)


def write_bundle(folder: Path) -> dict[str, str]:
    """Writes this very file into `folder`, so that what was loaded from a bundle is saved with one; its auto_map."""
    text = Path(__file__).read_text(encoding="utf-8")
    (folder / "modeling_ssmorph.py").write_text(text, encoding="utf-8")
    classes = {"AutoConfig": "SsmorphConfig", "AutoModelForCausalLM": "SsmorphForCausalLM"}
    return {auto: f"modeling_ssmorph.{name}" for auto, name in classes.items()}
