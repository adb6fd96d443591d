"""The selective scan as its recurrence, token by token: slow, obvious, and what other backends are tested against.

    S_t = a_t S_{t-1} + w_t x_t B_t^T        y_t = S_t C_t + D x_t        a_t = exp(log_a_t)      [Mamba-2, eq. 1 and 6]

B batch, L length, H heads, P head width, N state width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ssd_reference(
    x_BLHP: Tensor, log_a_BLH: Tensor, B_BLHN: Tensor, C_BLHN: Tensor, state_BHPN: Tensor, segment_BL: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Outputs [B, L, H, P] and the state after the last token; x already holds the weight w."""
    outputs = []
    for t in range(x_BLHP.shape[1]):
        if segment_BL is not None and t > 0:
            same_B = (segment_BL[:, t] == segment_BL[:, t - 1]).to(state_BHPN.dtype)
            state_BHPN = state_BHPN * same_B[:, None, None, None]
        update_BHPN = x_BLHP[:, t, :, :, None] * B_BLHN[:, t, :, None, :]
        state_BHPN = state_BHPN * log_a_BLH[:, t].exp()[..., None, None] + update_BHPN
        outputs.append(torch.einsum("bhpn,bhn->bhp", state_BHPN, C_BLHN[:, t]))
    return torch.stack(outputs, dim=1), state_BHPN
