"""One new token beside a window and a state: what window.py and the scan compute for it, in fewer operations.

Where one text at a time is decoded, a layer's time is the number of its operations, not their size. Here the sinks,
the window and the new token are one row of keys, and window and state are divided as soon as both are summed. It stands
for the general path wherever a call has one token; tests hold the two together.

B batch, H query heads, G key/value heads, P head width, Q = P + 1 values and their mass, N prototypes, S sinks, R
window, E = S + R keys that the token can see.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .window import Held, Scores


class Heard(NamedTuple):
    """What the state says to the token: its prototypes' logits, how much they may exceed the window's largest one
    before sums are scaled by them, and how loud it is heard."""

    logits_BHN: Tensor
    state_BGQN: Tensor
    gate_H: Tensor
    headroom: float


class Step(NamedTuple):
    """The sinks and the window with the new token in it, side by side, and the token that had to leave.

    `enters_B`: whether that one enters the state; the first S of a text become sinks, and padding is dropped.
    """

    k_BGEP: Tensor
    v_BGEP: Tensor
    valid_BE: Tensor
    seen_B: Tensor
    left_k_BGP: Tensor
    left_v_BGP: Tensor
    enters_B: Tensor

    @staticmethod
    def answers(q_BHLP: Tensor, scores: Scores) -> bool:
        """Whether this is such a call; an attention with a reach of its own or learned sinks takes the general path."""
        return q_BHLP.shape[2] == 1 and scores.reach is None and scores.logit_H is None

    @classmethod
    def of(cls, held: Held, k_BG1P: Tensor, v_BG1P: Tensor, valid_B1: Tensor | None) -> Step:
        """The step from what was held to this token."""
        if valid_B1 is None:
            valid_B1 = torch.ones_like(held.valid_BR[:, :1])
        leaves_B1 = held.valid_BR[:, :1]
        # how many tokens of its text came before the one that leaves
        rank_B1 = (held.seen_B - held.valid_BR.sum(1)).unsqueeze(1)
        sinks = held.filled_BS.shape[1]
        slot_BS = leaves_B1 & (rank_B1 == torch.arange(sinks, device=rank_B1.device))
        k_BGEP, v_BGEP = (
            torch.cat([torch.where(slot_BS[:, None, :, None], ring[:, :, :1], sink), ring[:, :, 1:], new], dim=2)
            for sink, ring, new in ((held.sink_k_BGSP, held.k_BGRP, k_BG1P), (held.sink_v_BGSP, held.v_BGRP, v_BG1P))
        )
        valid_BE = torch.cat([held.filled_BS | slot_BS, held.valid_BR[:, 1:], valid_B1], dim=1)
        seen_B = held.seen_B + valid_B1.squeeze(1)
        enters_B = (leaves_B1 & (rank_B1 >= sinks)).squeeze(1)
        return cls(k_BGEP, v_BGEP, valid_BE, seen_B, held.k_BGRP[:, :, 0], held.v_BGRP[:, :, 0], enters_B)

    def held(self, sinks: int) -> Held:
        """What the next call needs."""
        parts = [(t[..., :sinks, :], t[..., sinks:, :]) for t in (self.k_BGEP, self.v_BGEP)]
        (sink_k, ring_k), (sink_v, ring_v) = parts
        return Held(ring_k, ring_v, self.valid_BE[:, sinks:], sink_k, sink_v, self.valid_BE[:, :sinks], self.seen_B)

    def attended(self, q_BHP: Tensor, scores: Scores, heard: Heard | None) -> Tensor:
        """Window and state over one normaliser, [B, H, P], float32."""
        groups = self.k_BGEP.shape[1]
        q_BGHP = q_BHP.unflatten(1, (groups, -1))
        logits_BGHE = scores.capped(scores.scale * (q_BGHP @ self.k_BGEP.transpose(-1, -2)).float())
        logits_BGHE = logits_BGHE.masked_fill(~self.valid_BE[:, None, None], float("-inf"))
        # a padded token may see nothing at all
        top_BGH1 = logits_BGHE.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min / 2)
        if heard is not None:
            far_BGHN = heard.logits_BHN.unflatten(1, (groups, -1))
            top_BGH1 = torch.maximum(top_BGH1, far_BGHN.amax(-1, keepdim=True) - heard.headroom)
        weights_BGHE = torch.exp(logits_BGHE - top_BGH1)
        sums_BGHP, mass_BGH1 = weights_BGHE @ self.v_BGEP.float(), weights_BGHE.sum(-1, keepdim=True)
        if heard is not None:
            C_BGHN = torch.exp(far_BGHN - top_BGH1) * heard.gate_H.unflatten(0, (groups, -1)).unsqueeze(-1)
            far_BGHQ = C_BGHN @ heard.state_BGQN.transpose(-1, -2)
            sums_BGHP, mass_BGH1 = sums_BGHP + far_BGHQ[..., :-1], mass_BGH1 + far_BGHQ[..., -1:]
        return (sums_BGHP / mass_BGH1.clamp_min(torch.finfo(torch.float32).tiny)).flatten(1, 2)
