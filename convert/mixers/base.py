"""What student mixers share, and for a Mamba-2 layer alone: projection, convolution, scan, caches, padding, packing.

B batch, L length, D model width, H heads, G groups, P head width, N state width, C convolved channels, E = H*P.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssmorph.kernels.conv import causal_conv, causal_conv_step
from ssmorph.kernels.ssd import ssd, ssd_step

from ..cache import MixerCacheLayer, cache_layer, padding_mask, segments


@dataclass(frozen=True, kw_only=True)
class MixerShape:
    """Sizes of a mixer. The faithful copy of an attention layer has groups = heads and state = head_dim."""

    hidden: int
    heads: int
    groups: int
    head_dim: int
    state: int
    conv_kernel: int = 4
    eps: float = 1e-5
    out_bias: bool = False
    # tokens that an attention window holds, its sinks among them; 0 for none
    window: int = 0
    sinks: int = 0
    # first channels of a head that RoPE turns, which the state behind a window sees turned back; 0 for as they are
    turned: int = 0
    # query heads that stay attention, in order; with a window all of a key/value head. `groups` are then its heads
    kept: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        # config.json has lists
        object.__setattr__(self, "kept", tuple(self.kept))

    @property
    def inner(self) -> int:
        """Width of the values: heads x head_dim."""
        return self.heads * self.head_dim

    @property
    def conv_channels(self) -> int:
        """Convolved channels: x, B and C."""
        return self.inner + 2 * self.groups * self.state

    def as_dict(self) -> dict[str, Any]:
        """The sizes as config.json keeps them."""
        return {**asdict(self), "kept": list(self.kept)}

    def group_of(self, head: int) -> int:
        """The key/value head that a query head reads."""
        return head // (self.heads // self.groups)

    def kept_groups(self) -> list[int]:
        """The key/value heads that kept heads read."""
        return sorted({self.group_of(h) for h in self.kept})

    def beside(self) -> MixerShape:
        """The heads beside the kept ones: Mamba-2 heads with groups = heads, or key/value heads that have a window."""
        if self.window:
            rest = self.groups - len(self.kept_groups())
            return replace(self, heads=rest * (self.heads // self.groups), groups=rest, kept=())
        rest = self.heads - len(self.kept)
        return replace(self, heads=rest, groups=rest, kept=())


class ScanInputs(NamedTuple):
    """What the mixing matrix is made of: M[t,s] = (C_t.B_s) exp(sum log_a) w_s, plus D on the diagonal."""

    x_BLHP: Tensor
    B_BLGN: Tensor
    C_BLGN: Tensor
    log_a_BLH: Tensor
    w_BLH: Tensor | None
    D_H: Tensor


class Mixer(nn.Module, ABC):
    """What stands in a decoder layer's place of self-attention, with its call signature."""

    kind: str

    def __init__(self, shape: MixerShape, layer_idx: int) -> None:
        super().__init__()
        self.shape = shape
        self.layer_idx = layer_idx

    @abstractmethod
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """[B, L, D] to ([B, L, D], None): the pair a self-attention returns, without attention weights."""

    @abstractmethod
    def output(self) -> nn.Linear:
        """The projection that ends the mixer; what it says is linear in this one's input."""

    @abstractmethod
    def synthetic_cache(self, tokens: int) -> MixerCacheLayer:
        """A cache as large as it is after `tokens` tokens of one row, for measurements of speed and bytes."""


class Taps(nn.Conv1d):
    """Holds the convolution under the name stock checkpoints use; read in its own forward, the only time at which
    offloaded weights are present."""

    def forward(self) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """Weight, [C, K], and bias."""
        return self.weight.squeeze(1), self.bias


class ScanMixer(Mixer):
    """A Mamba-2 layer: all it remembers is a state.

    Subclasses say how `in_proj` splits, what decay and weight a token has, and what happens after the scan.
    """

    conv_silu: bool

    def __init__(self, shape: MixerShape, layer_idx: int, projected: int) -> None:
        super().__init__(shape, layer_idx)
        self.in_proj = nn.Linear(shape.hidden, projected, bias=False)
        channels = shape.conv_channels
        self.conv1d = Taps(channels, channels, shape.conv_kernel, groups=channels, padding=shape.conv_kernel - 1)
        self.D = nn.Parameter(torch.zeros(shape.heads))
        self.out_proj = nn.Linear(shape.inner, shape.hidden, bias=shape.out_bias)

    @abstractmethod
    def _split(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """in_proj's output as (gate, convolved channels, decay input)."""

    @abstractmethod
    def _decay(self, decay_BLH: Tensor) -> tuple[Tensor, Tensor | None]:
        """(log-decay, weight) of each token, both [B, L, H]; weight None means 1."""

    @abstractmethod
    def _finish(self, y_BLE: Tensor, gate_BLE: Tensor) -> Tensor:
        """Gate and norm after the scan; [B, L, E]."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        layer_past: Any = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """[B, L, D] to ([B, L, D], None): the pair a self-attention returns, without attention weights.

        `layer_past` is what some families call the cache.
        """
        valid_BL = padding_mask(attention_mask, hidden_states.shape[1])
        cache = cache_layer(layer_past if past_key_values is None else past_key_values, self.layer_idx, MixerCacheLayer)
        features_BLE = self.features(hidden_states, valid_BL, segments(position_ids, valid_BL), cache)
        return self.out_proj(features_BLE), None

    def features(
        self, hidden_BLD: Tensor, valid_BL: Tensor | None = None, segment_BL: Tensor | None = None, cache: Any = None
    ) -> Tensor:
        """What enters `out_proj`: [B, L, E]. The output is linear in it, which calibration uses."""
        if valid_BL is not None:
            hidden_BLD = hidden_BLD * valid_BL.unsqueeze(-1).to(hidden_BLD.dtype)
        gate, channels, decay = self._split(self.in_proj(hidden_BLD))
        if cache is not None and hidden_BLD.shape[1] == 1 and self._is_a_step(channels, cache):
            y_BLHP = self._step(channels, decay, cache)
        else:
            y_BLHP = self._scan(channels, decay, valid_BL, segment_BL, cache)
        return self._finish(y_BLHP.flatten(-2), gate)

    def output(self) -> nn.Linear:
        """out_proj."""
        return self.out_proj

    def synthetic_cache(self, tokens: int) -> MixerCacheLayer:
        """A cache as large as it is after `tokens` tokens of one row, for measurements of speed and bytes."""
        shape, weight = self.shape, self.in_proj.weight
        layer = MixerCacheLayer()
        state_BHPN = torch.zeros(1, shape.heads, shape.head_dim, shape.state, device=weight.device)
        layer.store(weight.new_zeros(1, shape.conv_kernel - 1, shape.conv_channels), state_BHPN, tokens)
        return layer

    def scan_inputs(self, hidden_BLD: Tensor) -> ScanInputs:
        """The mixing matrix's factors for unpadded, unpacked inputs."""
        _, channels, decay = self._split(self.in_proj(hidden_BLD))
        return self._scan_inputs(self._convolve(channels), decay, None)

    def _convolve(self, channels: Tensor, past: Tensor | None = None, segment_BL: Tensor | None = None) -> Tensor:
        weight_CK, bias_C = self.conv1d()
        return causal_conv(channels, weight_CK, bias_C, silu=self.conv_silu, past_BKC=past, segment_BL=segment_BL)

    def _scan_inputs(self, convolved: Tensor, decay: Tensor, valid_BL: Tensor | None) -> ScanInputs:
        shape = self.shape
        x, B, C = convolved.split([shape.inner, shape.groups * shape.state, shape.groups * shape.state], dim=-1)
        log_a_BLH, w_BLH = self._decay(decay)
        if valid_BL is not None:
            # a padded token neither writes nor decays
            real_BL1 = valid_BL.unsqueeze(-1)
            log_a_BLH = log_a_BLH * real_BL1
            w_BLH = real_BL1.expand_as(log_a_BLH).to(log_a_BLH.dtype) if w_BLH is None else w_BLH * real_BL1
        heads = (shape.heads, shape.head_dim)
        groups = (shape.groups, shape.state)
        return ScanInputs(
            x.unflatten(-1, heads), B.unflatten(-1, groups), C.unflatten(-1, groups), log_a_BLH, w_BLH, self.D
        )

    def _scan(
        self, channels: Tensor, decay: Tensor, valid_BL: Tensor | None, segment_BL: Tensor | None, cache: Any
    ) -> Tensor:
        past = state = None
        if cache is not None and cache.has_previous_state[0]:
            past, state = cache.conv_states[0], cache.recurrent_states[0]
        s = self._scan_inputs(self._convolve(channels, past, segment_BL), decay, valid_BL)
        y_BLHP, final_BHPN = ssd(
            s.x_BLHP,
            s.log_a_BLH,
            s.B_BLGN,
            s.C_BLGN,
            w_BLH=s.w_BLH,
            D_H=s.D_H,
            initial_state_BHPN=state,
            segment_BL=segment_BL,
        )
        if cache is not None:
            cache.store(self._last_inputs(channels, past, segment_BL), final_BHPN, channels.shape[1])
        return y_BLHP

    def _last_inputs(self, channels: Tensor, past: Tensor | None, segment_BL: Tensor | None) -> Tensor:
        """The K-1 newest convolution inputs of the newest document, [B, K-1, C]."""
        keep = self.shape.conv_kernel - 1
        if segment_BL is not None:
            channels = channels * (segment_BL == segment_BL[:, -1:]).unsqueeze(-1)
        before = (
            channels.new_zeros(channels.shape[0], keep, channels.shape[2]) if past is None else past.to(channels.dtype)
        )
        return torch.cat([before, channels[:, -keep:]], dim=1)[:, -keep:].clone()

    def _is_a_step(self, channels: Tensor, cache: Any) -> bool:
        """Whether a single token goes on from a state, and nobody asks for gradients, which `_step` has not."""
        if not cache.has_previous_state[0]:
            return False
        return not torch.is_grad_enabled() or not any(
            t.requires_grad for t in (channels, *cache.tensors(), *self.parameters())
        )

    def _step(self, channels: Tensor, decay: Tensor, cache: Any) -> Tensor:
        weight_CK, bias_C = self.conv1d()
        past_BKC, state_BHPN = cache.conv_states[0], cache.recurrent_states[0]
        convolved = causal_conv_step(past_BKC, channels[:, 0], weight_CK, bias_C, silu=self.conv_silu)
        s = self._scan_inputs(convolved.unsqueeze(1), decay, None)
        w_BH = None if s.w_BLH is None else s.w_BLH[:, 0]
        y_BHP = ssd_step(
            state_BHPN, s.x_BLHP[:, 0], s.log_a_BLH[:, 0], s.B_BLGN[:, 0], s.C_BLGN[:, 0], w_BH=w_BH, D_H=s.D_H
        )
        cache.store(past_BKC, state_BHPN, 1)
        return y_BHP.unsqueeze(1)
