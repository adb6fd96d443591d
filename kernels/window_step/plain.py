"""One new token beside a window and a state in plain torch: what window and scan compute for it, in fewer operations.

Where one text at a time is decoded, a layer's time is the number of its operations, not their size. Here the sinks,
the window and the new token are one row of keys, and window and state are divided as soon as both are summed.

B batch, H query heads, G key/value heads, P head width, Q = P + 1 values and their mass, N prototypes, S sinks, R
window, E = S + R keys that the token can see.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.rope import Tables, turned_back


class Held(NamedTuple):
    """What stays between calls: the window's keys and values, the sinks that left it, and tokens seen per row."""

    k_BGRP: Tensor
    v_BGRP: Tensor
    valid_BR: Tensor
    sink_k_BGSP: Tensor
    sink_v_BGSP: Tensor
    filled_BS: Tensor
    seen_B: Tensor


class Far(NamedTuple):
    """The state before this token, float32, and its parameters: where keys write and queries read, step, decay, gate.

    `headroom` is how much a prototype's logit may exceed the window's largest one before sums are scaled by it. With
    `tables`, RoPE's of this token, the state sees queries and keys turned back by its angle.
    """

    state_BGQN: Tensor
    key_map_GNP: Tensor
    key_bias_GN: Tensor
    query_map_HNP: Tensor
    query_bias_HN: Tensor
    dt_map_GP: Tensor
    dt_bias_G: Tensor
    A_log_G: Tensor
    gate_H: Tensor
    headroom: float
    tables: Tables | None


def window_step_chunked(
    held: Held, q_BHP: Tensor, k_BGP: Tensor, v_BGP: Tensor, valid_B: Tensor | None, scale: float,
    softcap: float | None, far: Far | None,
) -> tuple[Tensor, Held, Tensor | None]:  # fmt: skip
    """`window_step`, with gradients."""
    held, left_k_BGP, left_v_BGP, enters_B = _moved(held, k_BGP, v_BGP, valid_B)
    logits_BHN = gate_H = state_BGQN = None
    if far is not None:
        logits_BHN, state_BGQN = _heard(far, q_BHP, left_k_BGP, left_v_BGP, enters_B, softcap)
        gate_H = far.gate_H.float().clamp_min(0)
    k_BGEP, v_BGEP = (
        torch.cat(pair, dim=2) for pair in ((held.sink_k_BGSP, held.k_BGRP), (held.sink_v_BGSP, held.v_BGRP))
    )
    valid_BE = torch.cat([held.filled_BS, held.valid_BR], dim=1)
    groups = k_BGEP.shape[1]
    q_BGHP = q_BHP.unflatten(1, (groups, -1))
    logits_BGHE = _capped(scale * (q_BGHP @ k_BGEP.transpose(-1, -2)).float(), softcap)
    logits_BGHE = logits_BGHE.masked_fill(~valid_BE[:, None, None], float("-inf"))
    # a padded token may see nothing at all
    top_BGH1 = logits_BGHE.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min / 2)
    if far is not None and logits_BHN is not None:
        far_BGHN = logits_BHN.unflatten(1, (groups, -1))
        top_BGH1 = torch.maximum(top_BGH1, far_BGHN.amax(-1, keepdim=True) - far.headroom)
    weights_BGHE = torch.exp(logits_BGHE - top_BGH1)
    sums_BGHP, mass_BGH1 = weights_BGHE @ v_BGEP.float(), weights_BGHE.sum(-1, keepdim=True)
    if state_BGQN is not None and gate_H is not None:
        C_BGHN = torch.exp(far_BGHN - top_BGH1) * gate_H.unflatten(0, (groups, -1)).unsqueeze(-1)
        far_BGHQ = C_BGHN @ state_BGQN.transpose(-1, -2)
        sums_BGHP, mass_BGH1 = sums_BGHP + far_BGHQ[..., :-1], mass_BGH1 + far_BGHQ[..., -1:]
    answer_BHP = (sums_BGHP / mass_BGH1.clamp_min(torch.finfo(torch.float32).tiny)).flatten(1, 2)
    return answer_BHP, held, state_BGQN


def _moved(held: Held, k_BGP: Tensor, v_BGP: Tensor, valid_B: Tensor | None) -> tuple[Held, Tensor, Tensor, Tensor]:
    """What is held with the new token in it; key and value of the one that had to leave, and whether that one enters
    the state: the first S of a text become sinks, and padding is dropped."""
    valid_B1 = torch.ones_like(held.valid_BR[:, :1]) if valid_B is None else valid_B.unsqueeze(1)
    leaves_B1 = held.valid_BR[:, :1]
    # how many tokens of its text came before the one that leaves
    rank_B1 = (held.seen_B - held.valid_BR.sum(1)).unsqueeze(1)
    sinks = held.filled_BS.shape[1]
    slot_BS = leaves_B1 & (rank_B1 == torch.arange(sinks, device=rank_B1.device))
    left_k_BGP, left_v_BGP = held.k_BGRP[:, :, 0], held.v_BGRP[:, :, 0]
    (sink_k, ring_k), (sink_v, ring_v) = (
        (
            torch.where(slot_BS[:, None, :, None], ring[:, :, :1], sink),
            torch.cat([ring[:, :, 1:], new.unsqueeze(2)], dim=2),
        )
        for sink, ring, new in ((held.sink_k_BGSP, held.k_BGRP, k_BGP), (held.sink_v_BGSP, held.v_BGRP, v_BGP))
    )
    valid_BR = torch.cat([held.valid_BR[:, 1:], valid_B1], dim=1)
    seen_B = held.seen_B + valid_B1.squeeze(1)
    after = Held(ring_k, ring_v, valid_BR, sink_k, sink_v, held.filled_BS | slot_BS, seen_B)
    return after, left_k_BGP, left_v_BGP, (leaves_B1 & (rank_B1 >= sinks)).squeeze(1)


def _heard(
    far: Far, q_BHP: Tensor, left_k_BGP: Tensor, left_v_BGP: Tensor, enters_B: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """The prototypes' logits, [B, H, N], and the state with the token that left in it."""
    # turned at once: the token that leaves is as far away as the present position says
    both = torch.cat([q_BHP, left_k_BGP], dim=1)
    both = both.float() if far.tables is None else turned_back(both.unsqueeze(2), far.tables).squeeze(2)
    q_BHP, k_BGP = both.split([q_BHP.shape[1], left_k_BGP.shape[1]], dim=1)
    B_BGN = _mapped(k_BGP, far.key_map_GNP, far.key_bias_GN).softmax(-1)
    dt_BG = F.softplus((k_BGP * far.dt_map_GP.float()).sum(-1) + far.dt_bias_G.float()) * enters_B.unsqueeze(-1)
    decay_BG = torch.exp(-dt_BG * far.A_log_G.float().exp())
    x_BGQ = dt_BG.unsqueeze(-1) * F.pad(left_v_BGP.float(), (0, 1), value=1.0)
    state = torch.addcmul(decay_BG[..., None, None] * far.state_BGQN, x_BGQ.unsqueeze(-1), B_BGN.unsqueeze(-2))
    return _capped(_mapped(q_BHP, far.query_map_HNP, far.query_bias_HN), softcap), state


def _mapped(x_BKP: Tensor, map_KNP: Tensor, bias_KN: Tensor) -> Tensor:
    """Each head's own linear map, [B, K, N], float32."""
    return torch.baddbmm(bias_KN.float().unsqueeze(1), x_BKP.transpose(0, 1), map_KNP.float().mT).transpose(0, 1)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    """c tanh(logit / c), where there is a soft cap."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
