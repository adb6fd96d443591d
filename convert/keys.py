"""Softmax attention of a few heads over all tokens, and the keys and values that it keeps between calls.

The mask is made from what mixers know of tokens (padding, documents) and from how far the attention itself sees, so
one code path serves whole texts, chunks and single tokens. B batch, L new tokens, S tokens held and new, K kept query
heads, G key/value heads that they need, P head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .window import Scores


class Keys(NamedTuple):
    """Keys and values, [B, G, S, P], and which of the tokens may be seen, [B, S]; None where all may."""

    k_BGSP: Tensor
    v_BGSP: Tensor
    valid_BS: Tensor | None = None

    def joined(self, new: Keys) -> Keys:
        """These before `new`."""
        valid_BS = None
        if self.valid_BS is not None or new.valid_BS is not None:
            valid_BS = torch.cat([self.valid(), new.valid()], dim=1)
        k_BGSP, v_BGSP = torch.cat([self.k_BGSP, new.k_BGSP], dim=2), torch.cat([self.v_BGSP, new.v_BGSP], dim=2)
        return Keys(k_BGSP, v_BGSP, valid_BS)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Keys:
        """These with every tensor changed alike."""
        return Keys(change(self.k_BGSP), change(self.v_BGSP), None if self.valid_BS is None else change(self.valid_BS))

    def valid(self) -> Tensor:
        """Which of the tokens may be seen, [B, S]."""
        batch, _, length, _ = self.k_BGSP.shape
        all_BS = torch.ones(batch, length, dtype=torch.bool, device=self.k_BGSP.device)
        return all_BS if self.valid_BS is None else self.valid_BS

    def hold(self, segment_BL: Tensor | None, reach: int | None) -> Keys:
        """What the next call needs: of the newest document alone, and no more tokens than the attention sees."""
        length = self.k_BGSP.shape[2]
        first = 0 if reach is None else max(0, length - reach + 1)
        valid_BS = self.valid_BS
        if segment_BL is not None:
            own_BS = _documents(segment_BL, length)
            valid_BS = self.valid() & (own_BS == own_BS[:, -1:])
        if not first:
            return Keys(self.k_BGSP, self.v_BGSP, valid_BS)
        # copies: a view would hold what it does not show
        k_BGSP, v_BGSP = self.k_BGSP[:, :, first:].clone(), self.v_BGSP[:, :, first:].clone()
        return Keys(k_BGSP, v_BGSP, None if valid_BS is None else valid_BS[:, first:].clone())


def pick(heads: Tensor, index: Sequence[int], dim: int) -> Tensor:
    """The heads of `index` along `dim`, in that order and as often as they are named."""
    return torch.stack([heads.select(dim, i) for i in index], dim)


def attended_keys(
    q_BKLP: Tensor, keys: Keys, groups: Sequence[int], segment_BL: Tensor | None, scores: Scores
) -> Tensor:
    """What each query head attends to, [B, K, L, P].

    Args:
        groups: for each query head, the place of its key/value head among those of `keys`.
        segment_BL: documents of the new tokens; what was held belongs to document 0.
    """
    seen = _seen(q_BKLP.shape[2], keys, segment_BL, scores.reach)
    plain, repeat = scores.softcap is None and scores.logit_H is None, len(groups) // keys.k_BGSP.shape[1]
    if plain and q_BKLP.shape[2] == 1 and list(groups) == [i // repeat for i in range(len(groups))]:
        # decoding: the heads of a group as rows of one query, so that nothing held is copied
        q_BGKP = q_BKLP.unflatten(1, (-1, repeat)).squeeze(3)
        own_BGKP = F.scaled_dot_product_attention(q_BGKP, keys.k_BGSP, keys.v_BGSP, seen, scale=scores.scale)
        return own_BGKP.flatten(1, 2).unsqueeze(2)
    k_BKSP, v_BKSP = pick(keys.k_BGSP, groups, 1), pick(keys.v_BGSP, groups, 1)
    if plain:
        return F.scaled_dot_product_attention(q_BKLP, k_BKSP, v_BKSP, attn_mask=seen, scale=scores.scale)
    logits_BKLS = scores.capped(scores.scale * (q_BKLP @ k_BKSP.transpose(-1, -2)).float())
    if seen is not None:
        logits_BKLS = logits_BKLS.masked_fill(~seen, float("-inf"))
    if scores.logit_H is not None:
        sink_BKL1 = scores.logit_H.float()[:, None, None].expand(*logits_BKLS.shape[:3], 1)
        logits_BKLS = torch.cat([logits_BKLS, sink_BKL1], dim=-1)
    weights_BKLS = logits_BKLS.softmax(-1)[..., : k_BKSP.shape[2]]
    return weights_BKLS.to(v_BKSP.dtype) @ v_BKSP


def _seen(length: int, keys: Keys, segment_BL: Tensor | None, reach: int | None) -> Tensor | None:
    """Which tokens each new one sees, [1 or B, 1, L, S]; None where all are seen. A padded token sees itself."""
    if length == 1 and keys.valid_BS is None:
        # what is held never reaches further back than the attention sees
        return None
    size, device = keys.k_BGSP.shape[2], keys.k_BGSP.device
    ahead_LS = torch.arange(size - length, size, device=device)[:, None] - torch.arange(size, device=device)
    seen_BLS = (ahead_LS >= 0)[None]
    if reach is not None:
        seen_BLS = seen_BLS & (ahead_LS < reach)
    if keys.valid_BS is not None:
        seen_BLS = seen_BLS & (keys.valid_BS[:, None] | (ahead_LS == 0))
    if segment_BL is not None:
        own_BS = _documents(segment_BL, size)
        seen_BLS = seen_BLS & (segment_BL[:, :, None] == own_BS[:, None])
    return seen_BLS[:, None]


def _documents(segment_BL: Tensor, size: int) -> Tensor:
    """Documents of held and new tokens, [B, S]."""
    return F.pad(segment_BL, (size - segment_BL.shape[1], 0))
