"""The cache of one converted layer: the convolution's last inputs, the recurrent state, and how many tokens were seen.

transformers builds a DynamicCache of attention layers from the teacher's config; a mixer puts this layer in its own
place on its first call, so forward(), generate() and beams work unchanged. Offloading moves states alone.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, LinearAttentionLayer, StaticLayer

from ssmorph.kernels.window_step import Held

from ..errors import fail
from .keys import Keys


class MixerCacheLayer(LinearAttentionLayer, CacheLayerMixin):
    """conv_states[0]: [B, K-1, C]; recurrent_states[0]: [B, H, P, N], float32; seen: tokens so far."""

    is_compileable = False
    is_croppable = False

    def __init__(self) -> None:
        LinearAttentionLayer.__init__(self)
        self.keys = self.values = None
        self.is_initialized = False
        self.seen = 0

    def store(self, conv_BKC: Tensor, state_BHPN: Tensor, tokens: int) -> None:
        """Keeps both states after `tokens` more tokens."""
        self.conv_states[0], self.recurrent_states[0] = conv_BKC, state_BHPN
        self.is_conv_states_initialized[0] = self.is_recurrent_states_initialized[0] = True
        self.has_previous_state[0] = True
        self.device, self.dtype = state_BHPN.device, state_BHPN.dtype  # type: ignore[assignment]
        self.seen += tokens

    def lazy_initialization(self, *args: object, **kwargs: object) -> None:
        """Nothing to do: `store` sets both states."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Refused: a converted layer has no keys and values."""
        raise AssertionError("a converted layer was asked to store keys and values")

    def get_seq_length(self) -> int:
        """Tokens seen so far."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(key length, offset) as a full-attention layer would answer, since masks are built once for all layers."""
        return self.seen + int(query_length), 0

    def get_max_length(self) -> int:
        """-1: the state has a fixed size whatever the length."""
        return -1

    def reset(self) -> None:
        """Empties both states in place."""
        LinearAttentionLayer.reset(self)
        self.seen = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError: a recurrent state cannot forget its last tokens."""
        raise fail(
            "cache.crop", "a recurrent state cannot be cropped", tokens_to_remove, "Keep a copy of the cache instead."
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times."""
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows of `indices`."""
        self._map(lambda t: t[indices, ...])

    def tensors(self) -> list[Tensor]:
        """All that is kept."""
        kept = (self.conv_states[0], self.recurrent_states[0])
        return [t for t in kept if t is not None]

    def _map(self, change) -> None:  # type: ignore[no-untyped-def]
        if self.is_recurrent_states_initialized[0]:
            self.conv_states[0] = change(self.conv_states[0])
            self.recurrent_states[0] = change(self.recurrent_states[0])


class HoldingCacheLayer(MixerCacheLayer):
    """A cache with keys and values too, whose size is not known before the first call."""

    def reset(self) -> None:
        """Forgets everything."""
        self.__init__()  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Puts rows into the order of `beam_idx`."""
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))


class WindowCacheLayer(HoldingCacheLayer):
    """held: keys and values of the window and the sinks (window.py); kept: those of heads that attend to every token
    (keys.py); recurrent_states[0]: [B, G, P+1, N]."""

    def __init__(self) -> None:
        super().__init__()
        self.held: Held | None = None
        self.kept: Keys | None = None

    def keep(self, held: Held | None, state_BGQN: Tensor | None, kept: Keys | None, tokens: int) -> None:
        """Keeps all of it after `tokens` more tokens; None for what the mixer has not."""
        self.held, self.kept = held, kept
        if state_BGQN is not None:
            self.recurrent_states[0] = state_BGQN
            self.is_recurrent_states_initialized[0] = True
        self.has_previous_state[0] = True
        some = self.tensors()[0]
        self.device, self.dtype = some.device, some.dtype  # type: ignore[assignment]
        self.seen += tokens

    def tensors(self) -> list[Tensor]:
        """All that is kept."""
        return [*(self.held or ()), *(t for t in [*(self.kept or ()), self.recurrent_states[0]] if t is not None)]

    def _map(self, change) -> None:  # type: ignore[no-untyped-def]
        if self.held is not None:
            self.held = Held(*map(change, self.held))
        if self.kept is not None:
            self.kept = self.kept.mapped(change)
        if self.is_recurrent_states_initialized[0]:
            self.recurrent_states[0] = change(self.recurrent_states[0])


class HeadsCacheLayer(HoldingCacheLayer):
    """held: keys and values that kept heads read (keys.py); the states are those of the Mamba-2 heads beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.held: Keys | None = None

    def store(self, conv_BKC: Tensor, state_BHPN: Tensor, tokens: int) -> None:
        """Keeps both states; `keep` counts the tokens, since a layer may have no state at all."""
        super().store(conv_BKC, state_BHPN, 0)

    def keep(self, held: Keys, tokens: int) -> None:
        """Keeps keys and values after `tokens` more tokens."""
        self.held = held
        self.device, self.dtype = held.k_BGSP.device, held.k_BGSP.dtype  # type: ignore[assignment]
        self.seen += tokens

    def tensors(self) -> list[Tensor]:
        """All that is kept."""
        return [*super().tensors(), *(t for t in self.held or () if t is not None)]

    def _map(self, change) -> None:  # type: ignore[no-untyped-def]
        super()._map(change)
        if self.held is not None:
            self.held = self.held.mapped(change)


OneLayer = TypeVar("OneLayer", bound=MixerCacheLayer)


def cache_layer(cache: Cache | None, index: int, kind: type[OneLayer]) -> OneLayer | None:
    """This layer's place in the cache, made ours on first use: of `kind`.

    Raises:
        ValueError: a static cache, whose masks would let padding into the state, or one that another model has filled.
    """
    if cache is None:
        return None
    layers = cache.layers
    while len(layers) <= index:
        layers.append(DynamicLayer())
    if isinstance(layers[index], StaticLayer):
        raise fail(
            "generate.cache_implementation",
            "converted layers need the dynamic cache",
            "static",
            "Leave cache_implementation out.",
        )
    layer = layers[index]
    if not isinstance(layer, kind):
        if isinstance(layer, CacheLayerMixin) and layer.get_seq_length():
            raise fail(
                "past_key_values", "must come from this hybrid", f"keys and values in converted layer {index}",
                "Start with an empty cache.",
            )  # fmt: skip
        layers[index] = layer = kind()
    return layer


def padding_mask(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """Which of the last `length` tokens are real, [B, L] bool; None where all are.

    The attention mask a decoder hands to its mixers is [B, 1, L, S], boolean or additive: a token is real where it may
    see itself. FlashAttention's [B, S] is read directly.

    Raises:
        ValueError: flex attention's block mask.
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor):
        raise fail(
            "model.attn_implementation", "converted layers need a mask that is a tensor",
            type(attention_mask).__name__, "Use sdpa or eager.",
        )  # fmt: skip
    if attention_mask.dim() == 2:
        return attention_mask[:, -length:].bool()
    diagonal = attention_mask[:, 0, :, attention_mask.shape[-1] - length :].diagonal(dim1=-2, dim2=-1)
    return diagonal if diagonal.dtype == torch.bool else diagonal > torch.finfo(diagonal.dtype).min / 2


def check_mask(mask_BHLS: Tensor, position_ids: Tensor | None, reach: int | None) -> None:
    """What a caller gives as a mask of four dimensions is asked for padding alone; this refuses what says more.

    Args:
        reach: tokens that a sliding window of the teacher's holds, which a mask may have in it; None for none.

    Raises:
        ValueError: a real token does not see just the real ones of its document up to itself.
    """
    length = mask_BHLS.shape[2]
    held = mask_BHLS.shape[3] - length
    sees_BHLS = mask_BHLS
    if mask_BHLS.dtype != torch.bool:
        sees_BHLS = mask_BHLS > torch.finfo(mask_BHLS.dtype).min / 2
    valid_BL = padding_mask(mask_BHLS, length)
    assert valid_BL is not None
    # of what the cache has, padding is what nobody sees
    held_BS = (sees_BHLS[:, 0, :, :held] & valid_BL.unsqueeze(-1)).any(1)
    gap_LS = torch.arange(held, held + length, device=valid_BL.device).unsqueeze(-1)
    gap_LS = gap_LS - torch.arange(held + length, device=valid_BL.device)
    due_BLS = (gap_LS >= 0) & torch.cat([held_BS, valid_BL], 1).unsqueeze(1)
    segment_BL = segments(position_ids, valid_BL)
    if segment_BL is not None:
        due_BLS = due_BLS & (segment_BL.unsqueeze(-1) == torch.nn.functional.pad(segment_BL, (held, 0)).unsqueeze(1))
    wrong_BHLS = (sees_BHLS != due_BLS.unsqueeze(1)) & valid_BL[:, None, :, None]
    if reach is not None:
        wrong_BHLS = wrong_BHLS & (sees_BHLS | (gap_LS < reach))
    if bool(wrong_BHLS.any()):
        row, head, query, key = wrong_BHLS.nonzero()[0].tolist()
        verb = "sees" if sees_BHLS[row, head, query, key] else "does not see"
        raise fail(
            "attention_mask", "must be causal where it has four dimensions, but for padding and documents",
            f"row {row} where token {held + query} {verb} {key}",
            "Give position_ids that start over at each document, and [batch, tokens] for padding.",
        )  # fmt: skip


def segments(position_ids: Tensor | None, valid_BL: Tensor | None = None) -> Tensor | None:
    """Document of each token, [B, L], from the places where positions start over; None where none does.

    Padding starts none, and what follows it does only behind another document: `generate` gives all padding position 0.
    """
    if position_ids is None or position_ids.shape[-1] == 1:
        return None
    starts = (position_ids[:, 1:] == 0) | (position_ids[:, 1:] < position_ids[:, :-1])
    if valid_BL is not None:
        starts = starts & valid_BL[:, 1:] & (valid_BL.cumsum(1)[:, :-1] > 0)
    if not bool(starts.any()):
        return None
    return torch.nn.functional.pad(starts.to(torch.int32).cumsum(-1), (1, 0))
