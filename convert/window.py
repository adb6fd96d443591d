"""Softmax over a short window and a few sinks, and over everything older at once through what a scan remembers of it.

A query sees the last R tokens, the first S of its document (the sinks), and what left the window as one more mass:

    out_t = (sum_near exp(l_ts) v_s + C_t Y_t) / (sum_near exp(l_ts) + C_t Z_t)

with the softmax's own normaliser over both, so that a far token competes with a near one. The token that leaves at t
enters the scan at t: the window and the scan never hold the same token. One code path serves whole texts, chunks and
single tokens: the window's R tokens are always put before the new ones, empty at the start.

B batch, L new tokens, E = R + L tokens of the window and new, H query heads, G key/value heads, P head width, S sinks,
X = S + E places where a key can be, M documents.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmorph.kernels.window_step import Held


class Scores(NamedTuple):
    """How queries and keys become logits: scale, soft cap, one more logit per head (learned sinks, [H]) that takes mass
    and has no value, and how many tokens the attention itself sees; None for none and for all."""

    scale: float
    softcap: float | None = None
    logit_H: Tensor | None = None
    reach: int | None = None

    def capped(self, logits: Tensor) -> Tensor:
        """c tanh(logit / c), where there is a soft cap."""
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class Near(NamedTuple):
    """The window's part: sums of exp(logit - top) with and without values, and the largest logit `top`."""

    values_BHLP: Tensor
    mass_BHL: Tensor
    top_BHL: Tensor


class Leaving(NamedTuple):
    """The token that leaves the window at each step: key, value, whether it enters the scan, its document, and whether
    that is the query's."""

    k_BGLP: Tensor
    v_BGLP: Tensor
    enters_BL: Tensor
    segment_BL: Tensor | None
    own_BL: Tensor | None


def empty(k_BGLP: Tensor, window: int, sinks: int) -> Held:
    """Nothing held, for keys like these."""
    batch, groups, _, width = k_BGLP.shape
    ring = k_BGLP.new_zeros(batch, groups, window, width)
    slots = k_BGLP.new_zeros(batch, groups, sinks, width)
    flags = torch.zeros(batch, window + sinks, dtype=torch.bool, device=k_BGLP.device)
    seen_B = torch.zeros(batch, dtype=torch.long, device=k_BGLP.device)
    return Held(ring, ring.clone(), flags[:, :window], slots, slots.clone(), flags[:, window:], seen_B)


class Window:
    """One call: the held and the new tokens side by side."""

    def __init__(
        self, held: Held, k_BGLP: Tensor, v_BGLP: Tensor, valid_BL: Tensor | None, segment_BL: Tensor | None
    ) -> None:
        self.held, self.length = held, k_BGLP.shape[2]
        self.size, self.sinks = held.k_BGRP.shape[2], held.sink_k_BGSP.shape[2]
        self.k_BGEP = torch.cat([held.k_BGRP, k_BGLP], dim=2)
        self.v_BGEP = torch.cat([held.v_BGRP, v_BGLP], dim=2)
        if valid_BL is None:
            valid_BL = torch.ones(k_BGLP.shape[0], self.length, dtype=torch.bool, device=k_BGLP.device)
        self.valid_BE = torch.cat([held.valid_BR, valid_BL], dim=1)
        self.segment_BE: Tensor | None = None
        if segment_BL is not None:
            segment_BL = segment_BL.expand(k_BGLP.shape[0], -1).long()
            # what is held belongs to the document that goes on
            self.segment_BE = torch.cat([segment_BL.new_zeros(held.valid_BR.shape), segment_BL], dim=1)
        self.rank_BE = self._ranks()
        self.sink_BE = self.valid_BE & (self.rank_BE < self.sinks)
        self.place_BMS = self._places()

    def near(self, q_BHLP: Tensor, scores: Scores) -> Near:
        """Attention over the window and the sinks, before it is divided by its mass; float32."""
        blocks_BHKCW = self._window_logits(q_BHLP, scores)
        sinks_BHLT = self._sink_logits(q_BHLP, scores)
        count, block, width = blocks_BHKCW.shape[2:]
        top_BHL = blocks_BHKCW.amax(-1).flatten(2)[..., : self.length]
        if sinks_BHLT.shape[-1]:
            top_BHL = torch.maximum(top_BHL, sinks_BHLT.amax(-1))
        # a padded query sees nothing at all
        top_BHL = top_BHL.detach().clamp_min(torch.finfo(torch.float32).min / 2)
        padded = F.pad(top_BHL, (0, count * block - self.length)).unflatten(-1, (count, block))
        weight_BHKCW = torch.exp(blocks_BHKCW - padded.unsqueeze(-1))
        v_BGKWP = _windows(self.v_BGEP, block, width, count).transpose(-1, -2).float()
        grouped = weight_BHKCW.unflatten(1, (v_BGKWP.shape[1], -1))
        values_BHLP = (grouped @ v_BGKWP.unsqueeze(2)).flatten(1, 2).flatten(2, 3)[:, :, : self.length]
        mass_BHL = weight_BHKCW.sum(-1).flatten(2)[..., : self.length]
        if sinks_BHLT.shape[-1]:
            weight_BHLT = torch.exp(sinks_BHLT - top_BHL.unsqueeze(-1))
            v_BGTP = self._sink(self.held.sink_v_BGSP, self.v_BGEP).float()
            grouped = weight_BHLT.unflatten(1, (v_BGTP.shape[1], -1))
            values_BHLP = values_BHLP + (grouped @ v_BGTP.unsqueeze(2)).flatten(1, 2)
            mass_BHL = mass_BHL + weight_BHLT.sum(-1)
        if scores.logit_H is not None:
            mass_BHL = mass_BHL + torch.exp(scores.logit_H.float()[:, None] - top_BHL)
        return Near(values_BHLP, mass_BHL, top_BHL)

    def leaving(self) -> Leaving:
        """The tokens that leave, one for each new one; sinks and padding do not enter the scan."""
        out = slice(0, self.length)
        enters_BL = (self.valid_BE & ~self.sink_BE)[:, out]
        segment_BL = own_BL = None
        if self.segment_BE is not None:
            segment_BL = self.segment_BE[:, out]
            own_BL = segment_BL == self.segment_BE[:, self.size :]
        return Leaving(self.k_BGEP[:, :, out], self.v_BGEP[:, :, out], enters_BL, segment_BL, own_BL)

    def hold(self) -> Held:
        """What the next call needs: of the newest document alone."""
        valid_BR, last_B = self.valid_BE[:, self.length :], None
        place_BS = self.place_BMS[:, -1]
        if self.segment_BE is not None:
            last_B = self.segment_BE[:, -1]
            valid_BR = valid_BR & (self.segment_BE[:, self.length :] == last_B[:, None])
            place_BS = self.place_BMS[torch.arange(len(last_B), device=last_B.device), last_B]
        slots = [
            _gather(torch.cat([old, new], dim=2), place_BS)
            for old, new in ((self.held.sink_k_BGSP, self.k_BGEP), (self.held.sink_v_BGSP, self.v_BGEP))
        ]
        mine_BE = self.valid_BE
        if self.segment_BE is not None:
            mine_BE = mine_BE & (self.segment_BE == self.segment_BE[:, -1:])
        seen_B = torch.where(mine_BE, self.rank_BE + 1, 0).amax(1)
        if last_B is None:
            # a call of padding alone leaves the count as it was
            seen_B = torch.maximum(seen_B, self.held.seen_B)
        k_BGRP, v_BGRP = (t[:, :, self.length :].clone() for t in (self.k_BGEP, self.v_BGEP))
        return Held(k_BGRP, v_BGRP, valid_BR.clone(), slots[0], slots[1], place_BS >= 0, seen_B)

    def _ranks(self) -> Tensor:
        """How many tokens of its document came before each, [B, E]."""
        count_BE = self.valid_BE.long().cumsum(1)
        first_B1 = (self.held.valid_BR.sum(1) - self.held.seen_B).unsqueeze(1)
        if self.segment_BE is None:
            return count_BE - 1 - first_B1
        starts_BE = F.pad(self.segment_BE[:, 1:] != self.segment_BE[:, :-1], (1, 0))
        before_BE = torch.where(starts_BE, count_BE - self.valid_BE.long(), torch.iinfo(torch.long).min)
        before_BE[:, :1] = first_B1
        return count_BE - 1 - before_BE.cummax(1).values

    def _places(self) -> Tensor:
        """Where each document's sinks are, among slots and tokens that may leave now, [B, M, S]; -1: nowhere."""
        batch, device = len(self.valid_BE), self.valid_BE.device
        documents = 1 if self.segment_BE is None else int(self.segment_BE.max()) + 1
        place = torch.full((batch, documents * self.sinks + 1), -1, dtype=torch.long, device=device)
        slots_S = torch.arange(self.sinks, device=device)
        place[:, : self.sinks] = torch.where(self.held.filled_BS, slots_S, -1)
        sink_BL, rank_BL = self.sink_BE[:, : self.length], self.rank_BE[:, : self.length]
        document_BL = 0 if self.segment_BE is None else self.segment_BE[:, : self.length]
        # what is no sink goes to a last place that is cut off
        target_BL = torch.where(sink_BL, document_BL * self.sinks + rank_BL, documents * self.sinks)
        tokens_BL = (self.sinks + torch.arange(self.length, device=device)).expand_as(target_BL)
        place = place.scatter(1, target_BL, tokens_BL)[:, :-1]
        return place.unflatten(1, (documents, self.sinks))

    def _window_logits(self, q_BHLP: Tensor, scores: Scores) -> Tensor:
        """Scaled scores of blocks of C queries against the C + R - 1 keys that they reach, [B, H, K, C, C + R - 1]."""
        block = min(self.length, max(self.size, 16))
        count, width = -(-self.length // block), self.size + block - 1
        q_BHKCP = F.pad(q_BHLP, (0, 0, 0, count * block - self.length)).unflatten(2, (count, block))
        k_BGKPW = _windows(self.k_BGEP, block, width, count)
        grouped = q_BHKCP.unflatten(1, (k_BGKPW.shape[1], -1))
        logits = scores.capped(scores.scale * (grouped @ k_BGKPW.unsqueeze(2)).float()).flatten(1, 2)
        device = q_BHLP.device
        ahead_CW = torch.arange(width, device=device) - torch.arange(block, device=device)[:, None]
        seen = (ahead_CW >= 0) & (ahead_CW < self.size)
        if scores.reach is not None:
            seen &= self.size - 1 - ahead_CW < scores.reach
        seen_BKCW = seen & _windows(self.valid_BE[:, None, :, None], block, width, count)[:, 0]
        if self.segment_BE is not None:
            mine_BKC = F.pad(self.segment_BE[:, self.size :], (0, count * block - self.length), value=-1)
            theirs_BK1W = _windows(self.segment_BE[:, None, :, None], block, width, count)[:, 0]
            seen_BKCW = seen_BKCW & (mine_BKC.unflatten(1, (count, block)).unsqueeze(-1) == theirs_BK1W)
        return logits.masked_fill(~seen_BKCW.unsqueeze(1), float("-inf"))

    def _sink_logits(self, q_BHLP: Tensor, scores: Scores) -> Tensor:
        """Scaled scores against the sinks that have left the window, [B, H, L, M S]."""
        k_BGTP = self._sink(self.held.sink_k_BGSP, self.k_BGEP)
        grouped = q_BHLP.unflatten(1, (k_BGTP.shape[1], -1))
        logits = scores.capped(scores.scale * (grouped @ k_BGTP.transpose(-1, -2).unsqueeze(2)).float()).flatten(1, 2)
        place_B1T = self.place_BMS.flatten(1).unsqueeze(1)
        now_L1 = self.sinks + torch.arange(self.length, device=q_BHLP.device).unsqueeze(-1)
        seen_BLT = (place_B1T >= 0) & (place_B1T <= now_L1)
        if scores.reach is not None:
            rank_T = torch.arange(self.sinks, device=q_BHLP.device).repeat(self.place_BMS.shape[1])
            seen_BLT = seen_BLT & (self.rank_BE[:, self.size :, None] - rank_T < scores.reach)
        if self.segment_BE is not None:
            document_T = torch.arange(self.place_BMS.shape[1], device=q_BHLP.device).repeat_interleave(self.sinks)
            seen_BLT = seen_BLT & (self.segment_BE[:, self.size :, None] == document_T)
        return logits.masked_fill(~seen_BLT.unsqueeze(1), float("-inf"))

    def _sink(self, slots_BGSP: Tensor, tokens_BGEP: Tensor) -> Tensor:
        return _gather(torch.cat([slots_BGSP, tokens_BGEP], dim=2), self.place_BMS.flatten(1))


def _gather(places_BGXP: Tensor, index_BT: Tensor) -> Tensor:
    """The keys or values at these places, [B, G, T, P]; what is nowhere is anything."""
    index = index_BT.clamp_min(0)[:, None, :, None].expand(-1, places_BGXP.shape[1], -1, places_BGXP.shape[3])
    return places_BGXP.gather(2, index)


def _windows(tokens_BGEP: Tensor, block: int, width: int, count: int) -> Tensor:
    """What each block of queries reaches, [B, G, K, P, W]: a view, but for padding at the end. The first token of all
    is reached by none. For P = 1 the last two axes read [B, G, K, 1, W]."""
    missing = 1 + (count - 1) * block + width - tokens_BGEP.shape[2]
    return F.pad(tokens_BGEP, (0, 0, 0, missing))[:, :, 1:].unfold(2, width, block)
