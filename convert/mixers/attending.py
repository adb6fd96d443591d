"""What mixers share that keep the layer's own attention and answer in the place of its softmax.

The attention module stays whole: projections, norms, RoPE and output projection are its own. It calls an attention
function of ours by name, which hands queries, keys and values to the mixer. B batch, L length, H query heads, G
key/value heads, P head width.
"""

from __future__ import annotations

import copy
import threading
import zlib
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from ssmorph.kernels.common.rope import Tables

from ..cache import MixerCacheLayer, cache_layer, padding_mask, segments
from ..keys import Keys, attended_keys, pick
from ..rope import tables_in
from ..window import Scores
from .base import Mixer, MixerShape

# of this module alone: code saved beside weights may be loaded more than once, and calls are each module's own. In it a
# number, since transformers reads "flash", "/" and "|" in such names
FUNCTION = f"ssmorph_attending_{zlib.crc32(__name__.encode()):08x}"

# queries [B, H, L, P], keys and values [B, G, L, P] and how scores are made, to what is attended, [B, L, H, P]
Attend = Callable[[Tensor, Tensor, Tensor, Scores], Tensor]

# what stands for the softmax in the attention that this thread is in: two threads may run one model
_CALL = threading.local()


class AttentionCall(NamedTuple):
    """What enters a layer, which tokens are valid and of which document, this layer's place in the cache (of
    `cache_kind`), and RoPE's tables for these tokens."""

    hidden_BLD: Tensor
    valid_BL: Tensor | None = None
    segment_BL: Tensor | None = None
    cache: Any = None
    tables: Tables | None = None


class AttendingMixer(Mixer):
    """A mixer around the layer's own attention. Subclasses say what stands for the softmax, and what is cached."""

    cache_kind: ClassVar[type[MixerCacheLayer]]

    def __init__(self, shape: MixerShape, layer_idx: int, attention: nn.Module, out: str) -> None:
        super().__init__(shape, layer_idx)
        _register()
        # a config of its own, which alone says that this attention calls our function
        config: Any = copy.copy(attention.config)
        config._attn_implementation_internal = FUNCTION
        attention.config = config
        self.attention = attention
        self.out_name = out

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What pickle calls, maybe in a process that has made no mixer yet."""
        super().__setstate__(state)
        _register()

    @abstractmethod
    def answer(self, call: AttentionCall) -> Attend:
        """What stands for the softmax in one call of the attention."""

    def output(self) -> nn.Linear:
        """The attention's output projection."""
        out = self.attention.get_submodule(self.out_name)
        assert isinstance(out, nn.Linear)
        return out

    def synthetic_keys(self, tokens: int) -> Keys:
        """Keys and values as large as kept heads hold after `tokens` tokens of one row."""
        # as the families' attentions read it themselves
        reach = getattr(self.attention, "sliding_window", getattr(self.attention.config, "sliding_window", None))
        held = tokens if reach is None else min(tokens, reach - 1)
        k_BGSP = self.output().weight.new_zeros(1, len(self.shape.kept_groups()), held, self.shape.head_dim)
        return Keys(k_BGSP, k_BGSP.clone())

    def attended_kept(
        self, q_BKLP: Tensor, new: Keys, held: Keys | None, segment_BL: Tensor | None, scores: Scores
    ) -> tuple[Tensor, Keys]:
        """What kept heads attend to, [B, K, L, P], and the keys and values that the next call needs.

        Args:
            q_BKLP: queries of the kept heads alone.
            new: keys and values that they read, likewise.
        """
        kept, groups = self.shape.kept, self.shape.kept_groups()
        if scores.logit_H is not None:
            scores = scores._replace(logit_H=pick(scores.logit_H, kept, 0))
        keys = new if held is None else held.joined(new)
        places = [groups.index(self.shape.group_of(h)) for h in kept]
        own_BKLP = attended_keys(q_BKLP, keys, places, segment_BL, scores)
        return own_BKLP, keys.hold(segment_BL, scores.reach)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        layer_past: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """[B, L, D] to ([B, L, D], None); other arguments, RoPE's tables among them, go to the attention."""
        valid_BL = padding_mask(attention_mask, hidden_states.shape[1])
        cache = cache_layer(layer_past if past_key_values is None else past_key_values, self.layer_idx, self.cache_kind)
        segment_BL = segments(position_ids, valid_BL)
        if position_ids is not None:
            kwargs["position_ids"] = position_ids
        attend = self.answer(AttentionCall(hidden_states, valid_BL, segment_BL, cache, tables_in(kwargs)))
        return self.call_attention(hidden_states, attend, kwargs), None

    def features(self, hidden_BLD: Tensor, **kwargs: Any) -> Tensor:
        """What enters the attention's output projection, [B, L, E]; whole documents without padding."""
        kept: list[Tensor] = []
        answer = self.answer(AttentionCall(hidden_BLD, tables=tables_in(kwargs)))

        def attend(*arguments: Any) -> Tensor:
            kept.append(answer(*arguments))
            return kept[0]

        self.call_attention(hidden_BLD, attend, kwargs)
        return kept[0].flatten(2)

    def call_attention(self, hidden_BLD: Tensor, attend: Attend, kwargs: dict[str, Any]) -> Tensor:
        """The attention's output with `attend` [B, L, H, P] in the place of its softmax."""
        before, _CALL.attend = getattr(_CALL, "attend", None), attend
        try:
            return self.attention(hidden_BLD, attention_mask=None, **kwargs)[0]
        finally:
            _CALL.attend = before


def _attending(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """What transformers calls by name: hands on to the mixer whose attention this is."""
    del module, attention_mask
    scale = kwargs.get("scaling")
    scale = float(query.shape[-1] ** -0.5 if scale is None else scale)
    attend: Attend = _CALL.attend
    scores = Scores(scale, kwargs.get("softcap"), kwargs.get("s_aux"), kwargs.get("sliding_window"))
    return attend(query, key, value, scores), None


def _register() -> None:
    AttentionInterface.register(FUNCTION, _attending)
    AttentionMaskInterface.register(FUNCTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
