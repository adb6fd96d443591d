"""A few of the layer's own attention heads, whole and with their keys and values, beside Mamba-2 heads for the rest.

Retrieval needs few heads, and those few need every key [retrieval-aware distillation, 2602.11374]. A kept head answers
by softmax over all that it saw before; a stock Mamba-2 of groups = heads answers in the places of the others, and the
attention's own output projection ends both. Only key/value heads that a kept head reads are cached, and where the
family's attention works without the others, only they are projected. With every head kept the layer is the teacher's
attention.

B batch, L length, H query heads, K kept ones, R the rest, G key/value heads, P head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..cache import HeadsCacheLayer
from ..keys import Keys, pick
from ..window import Scores
from .attending import Attend, AttendingMixer, AttentionCall
from .base import MixerShape
from .mamba2 import Mamba2Mixer


class RestMixer(Mamba2Mixer):
    """A stock Mamba-2 without an output projection: the attention's ends it."""

    def __init__(self, shape: MixerShape, layer_idx: int) -> None:
        super().__init__(shape, layer_idx)
        del self.out_proj

    def forward(self, *arguments: Any) -> Tensor:  # type: ignore[override]
        """What enters the attention's output projection in these heads' places; as `features`."""
        return self.features(*arguments)


def trim(projection: nn.Module, heads: Sequence[int], width: int) -> None:
    """Leaves a projection the rows of `heads`, in place."""
    assert isinstance(projection, nn.Linear)
    for name, tensor in list(projection.named_parameters()):
        rows = pick(tensor.detach().unflatten(0, (-1, width)), heads, 0).flatten(0, 1)
        setattr(projection, name, nn.Parameter(rows, requires_grad=tensor.requires_grad))
    projection.out_features = len(heads) * width


class HeadsMixer(AttendingMixer):
    """`mamba2_heads`: the heads `shape.kept`, and Mamba-2 for the rest."""

    kind = "mamba2_heads"
    cache_kind = HeadsCacheLayer

    def __init__(
        self, shape: MixerShape, layer_idx: int, attention: nn.Module, out: str, rows: Sequence[str] = ()
    ) -> None:
        super().__init__(shape, layer_idx, attention, out)
        assert shape.kept, "without a kept head a layer is plain mamba2"
        self.rest = tuple(h for h in range(shape.heads) if h not in shape.kept)
        self.scan = RestMixer(shape.beside(), layer_idx) if self.rest else None
        self.trimmed = bool(rows)
        if self.trimmed:
            for name, heads in zip(rows, (shape.kept, shape.kept_groups(), shape.kept_groups()), strict=True):
                trim(attention.get_submodule(name), heads, shape.head_dim)

    def synthetic_cache(self, tokens: int) -> HeadsCacheLayer:
        """A cache as large as it is after `tokens` tokens of one row, for measurements of speed and bytes."""
        layer = HeadsCacheLayer()
        if self.scan is not None:
            conv_BKC, state_BHPN = self.scan.synthetic_cache(0).tensors()
            layer.store(conv_BKC, state_BHPN, 0)
        layer.keep(self.synthetic_keys(tokens), tokens)
        return layer

    def answer(self, call: AttentionCall) -> Attend:
        """Kept heads and Mamba-2 heads, each in its own place."""
        hidden_BLD, valid_BL, segment_BL, cache, _ = call
        places = {}
        if segment_BL is not None:
            segment_BL = segment_BL.expand(hidden_BLD.shape[0], -1)
        if self.scan is not None:
            features_BLRP = self.scan(hidden_BLD, valid_BL, segment_BL, cache).unflatten(-1, (len(self.rest), -1))
            places = dict(zip(self.rest, features_BLRP.unbind(2), strict=True))

        def attend(q_BHLP: Tensor, k_BGLP: Tensor, v_BGLP: Tensor, scores: Scores) -> Tensor:
            own_BKLP = self._kept(q_BHLP, Keys(k_BGLP, v_BGLP, valid_BL), segment_BL, scores, cache)
            every = places | dict(zip(self.shape.kept, own_BKLP.unbind(1), strict=True))
            return torch.stack([every[h].to(q_BHLP.dtype) for h in range(self.shape.heads)], dim=2)

        return attend

    def _kept(self, q_BHLP: Tensor, new: Keys, segment_BL: Tensor | None, scores: Scores, cache: Any) -> Tensor:
        """What the kept heads attend to, [B, K, L, P]; the cache keeps what they read."""
        shape, groups = self.shape, self.shape.kept_groups()
        if not self.trimmed:
            q_BHLP = pick(q_BHLP, shape.kept, 1)
            new = Keys(pick(new.k_BGSP, groups, 1), pick(new.v_BGSP, groups, 1), new.valid_BS)
        own_BKLP, keys = self.attended_kept(q_BHLP, new, None if cache is None else cache.held, segment_BL, scores)
        if cache is not None:
            cache.keep(keys, q_BHLP.shape[2])
        return own_BKLP
