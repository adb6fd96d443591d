"""The layer's own attention inside a short window, and a Mamba-2 state for every token that has left it.

The state is a scan over the tokens that leave: S_t = exp(-dt A) S_{t-1} + dt [v; 1] B^T. A key writes to the
prototypes it is close to, B = softmax(key_map k + key_bias); a query reads them as softmax attention would read keys
that lie there, C = gate exp(query_map q + query_bias). The ones beside the values collect the mass, by which window and
state are divided together. With the gate shut (at the start) or without a state the layer is the window alone.

Key/value heads may be kept whole, with their query heads: these attend to every token, and their keys and values are
cached for as long as the text is. Retrieval needs few of them [retrieval-aware distillation, 2602.11374].

Queries, keys and values are the attention's own, shared by the query heads of a group: nothing but the state is added
to what the window caches. The state sees queries and keys with RoPE taken back (rope.py), or it would know no positions
but those it was made for. B batch, L length, H query heads, G key/value heads, P head width, N
prototypes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmorph.kernels.common.rope import Tables, turned_back
from ssmorph.kernels.ssd import ssd
from ssmorph.kernels.window_step import Far, Held, window_step

from ..cache import WindowCacheLayer
from ..keys import Keys, pick
from ..window import Scores, Window, empty
from .attending import Attend, AttendingMixer, AttentionCall
from .base import MixerShape

# a prototype may outweigh the window's largest score by e^30 before sums are scaled by it
HEADROOM = 30.0


class StateTensors(NamedTuple):
    """The parameters of a state."""

    key_map: Tensor
    key_bias: Tensor
    query_map: Tensor
    query_bias: Tensor
    dt_map: Tensor
    dt_bias: Tensor
    A_log: Tensor
    gate: Tensor


class State(nn.Module):
    """The parameters of the state: where keys write, where queries read, step and decay, and how far it is heard."""

    def __init__(self, shape: MixerShape) -> None:
        super().__init__()
        heads, groups, states, width = shape.heads, shape.groups, shape.state, shape.head_dim
        self.key_map = nn.Parameter(torch.zeros(groups, states, width))
        self.key_bias = nn.Parameter(torch.zeros(groups, states))
        self.query_map = nn.Parameter(torch.zeros(heads, states, width))
        self.query_bias = nn.Parameter(torch.zeros(heads, states))
        self.dt_map = nn.Parameter(torch.zeros(groups, width))
        self.dt_bias = nn.Parameter(torch.zeros(groups))
        self.A_log = nn.Parameter(torch.zeros(groups))
        self.gate = nn.Parameter(torch.zeros(heads))

    def forward(self) -> StateTensors:
        """All of them; read here, where offloaded weights are present."""
        return StateTensors(self.key_map, self.key_bias, self.query_map, self.query_bias, self.dt_map, self.dt_bias,
                            self.A_log, self.gate)  # fmt: skip


class WindowedMixer(AttendingMixer):
    """`windowed_mamba2`: window, sinks and state."""

    kind = "windowed_mamba2"
    cache_kind = WindowCacheLayer

    def __init__(self, shape: MixerShape, layer_idx: int, attention: nn.Module, out: str) -> None:
        super().__init__(shape, layer_idx, attention, out)
        # of the heads that have a window: their sizes, and which they are
        self.window_shape = shape.beside()
        self.window_heads = [h for h in range(shape.heads) if h not in shape.kept]
        self.window_groups = [g for g in range(shape.groups) if g not in shape.kept_groups()]
        assert len(self.window_heads) == self.window_shape.heads, "a key/value head is kept with all of its query heads"
        self.state = State(self.window_shape) if shape.state and self.window_groups else None

    def synthetic_cache(self, tokens: int) -> WindowCacheLayer:
        """A cache as large as it is after `tokens` tokens of one row, for measurements of speed and bytes."""
        shape, weight, layer = self.window_shape, self.output().weight, WindowCacheLayer()
        held = state = kept = None
        if self.window_groups:
            held = empty(weight.new_zeros(1, shape.groups, 0, shape.head_dim), shape.window - shape.sinks, shape.sinks)
        if self.state is not None:
            state = weight.new_zeros(1, shape.groups, shape.head_dim + 1, shape.state, dtype=torch.float32)
        if self.shape.kept:
            kept = self.synthetic_keys(tokens)
        layer.keep(held, state, kept, tokens)
        return layer

    def answer(self, call: AttentionCall) -> Attend:
        """Window and state in the place of the softmax, which kept heads have as it was."""
        hidden_BLD, valid_BL, segment_BL, cache, tables = call
        if segment_BL is not None:
            segment_BL = segment_BL.expand(hidden_BLD.shape[0], -1)

        def attend(q_BHLP: Tensor, k_BGLP: Tensor, v_BGLP: Tensor, scores: Scores) -> Tensor:
            parts: list[Tensor] = []
            held = state = kept = None
            if cache is not None and cache.seen:
                held, state, kept = cache.held, cache.recurrent_states[0], cache.kept
            if self.window_heads:
                q, k, v, own_scores = self.with_window(q_BHLP, k_BGLP, v_BGLP, scores)
                if held is not None and is_a_step(q, own_scores):
                    answer_BHLP, held, state = self._one_step((q, k, v), held, valid_BL, own_scores, state, tables)
                else:
                    held = held or empty(k, self.shape.window - self.shape.sinks, self.shape.sinks)
                    window = Window(held, k, v, valid_BL, segment_BL)
                    answer_BHLP, state = self._near_and_far(q, window, own_scores, state, tables)
                    held = window.hold() if cache is not None else None
                parts.append(answer_BHLP.to(q_BHLP.dtype))
            if self.shape.kept:
                groups = self.shape.kept_groups()
                new = Keys(pick(k_BGLP, groups, 1), pick(v_BGLP, groups, 1), valid_BL)
                kept_BKLP, kept = self.attended_kept(pick(q_BHLP, self.shape.kept, 1), new, kept, segment_BL, scores)
                parts.append(kept_BKLP)
            if cache is not None:
                cache.keep(held, state, kept, q_BHLP.shape[2])
            return self._in_order(parts).transpose(1, 2)

        return attend

    def _in_order(self, parts: list[Tensor]) -> Tensor:
        """Heads with a window, then kept ones, as the attention has them."""
        if len(parts) == 1:
            return parts[0]
        places = [*self.window_heads, *self.shape.kept]
        return pick(torch.cat(parts, dim=1), [places.index(h) for h in range(self.shape.heads)], 1)

    def with_window(
        self, q_BHLP: Tensor, k_BGLP: Tensor, v_BGLP: Tensor, scores: Scores
    ) -> tuple[Tensor, Tensor, Tensor, Scores]:
        """Of queries, keys, values and scores those of the heads that have a window."""
        if not self.shape.kept:
            return q_BHLP, k_BGLP, v_BGLP, scores
        if scores.logit_H is not None:
            scores = scores._replace(logit_H=pick(scores.logit_H, self.window_heads, 0))
        return (
            pick(q_BHLP, self.window_heads, 1),
            pick(k_BGLP, self.window_groups, 1),
            pick(v_BGLP, self.window_groups, 1),
            scores,
        )

    def _near_and_far(
        self, q_BHLP: Tensor, window: Window, scores: Scores, state: Tensor | None, tables: Tables | None
    ) -> tuple[Tensor, Tensor | None]:
        """What heads with a window answer, [B, H, L, P], and the state after the last token."""
        near = window.near(q_BHLP, scores)
        values_BHLP, mass_BHL, final = near.values_BHLP, near.mass_BHL, None
        if self.state is not None:
            shrink_BHL, far_BHLQ, final = self.far(q_BHLP, window, near.top_BHL, scores, state, tables)
            values_BHLP = values_BHLP * shrink_BHL.unsqueeze(-1) + far_BHLQ[..., :-1]
            mass_BHL = mass_BHL * shrink_BHL + far_BHLQ[..., -1]
        return values_BHLP / mass_BHL.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1), final

    def _one_step(
        self,
        qkv: tuple[Tensor, Tensor, Tensor],
        held: Held,
        valid_B1: Tensor | None,
        scores: Scores,
        state_BGQN: Tensor | None,
        tables: Tables | None,
    ) -> tuple[Tensor, Held, Tensor | None]:
        """What `_near_and_far` answers, what is held and the state, for one token of the text that is held."""
        far = None
        if self.state is not None:
            assert state_BGQN is not None
            assert tables is not None or not self.shape.turned
            own: StateTensors = self.state()
            far = Far(state_BGQN, *own, HEADROOM, tables if self.shape.turned else None)
        q_BHP, k_BGP, v_BGP = (t.squeeze(2) for t in qkv)
        valid_B = None if valid_B1 is None else valid_B1.squeeze(1)
        answer_BHP, held, state_BGQN = window_step(
            held, q_BHP, k_BGP, v_BGP, valid_B=valid_B, scale=scores.scale, softcap=scores.softcap, far=far
        )
        return answer_BHP.unsqueeze(2), held, state_BGQN

    def placeless(self, x_BHLP: Tensor, tables: Tables | None) -> Tensor:
        """Queries, or keys that leave the window with them, as the state sees them: without their position; float32."""
        if not self.shape.turned:
            return x_BHLP.float()
        assert tables is not None, "RoPE's tables, which turn queries and keys, come with them"
        return turned_back(x_BHLP, tables)

    def far(
        self,
        q_BHLP: Tensor,
        window: Window,
        top_BHL: Tensor,
        scores: Scores,
        state_BGQN: Tensor | None,
        tables: Tables | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the state answers.

        Returns:
            The factor by which the window's sums shrink where a prototype outweighs them; the far values and their
            mass, [B, H, L, P + 1]; the state after the last token, [B, G, P + 1, N], float32.
        """
        assert self.state is not None
        left = window.leaving()
        own: StateTensors = self.state()
        q_BHLP, k_BGLP = self.placeless(q_BHLP, tables), self.placeless(left.k_BGLP, tables)
        repeat = self.window_shape.heads // self.window_shape.groups
        logits_BHLN = torch.einsum("bhlp,hnp->bhln", q_BHLP, own.query_map.float())
        logits_BHLN = logits_BHLN + own.query_bias.float()[:, None]
        logits_BHLN = scores.capped(logits_BHLN)
        over_BHL = torch.maximum(top_BHL, logits_BHLN.detach().amax(-1) - HEADROOM)
        C_BHLN = torch.exp(logits_BHLN - over_BHL.unsqueeze(-1)) * own.gate.float().clamp_min(0)[:, None, None]
        if scores.reach is not None and scores.reach <= window.size:
            # the attention itself saw no further
            C_BHLN = C_BHLN * 0
        if left.own_BL is not None:
            C_BHLN = C_BHLN * left.own_BL[:, None, :, None]
        scores_BGLN = torch.einsum("bglp,gnp->bgln", k_BGLP, own.key_map.float()) + own.key_bias.float()[:, None]
        dt_BGL = F.softplus(torch.einsum("bglp,gp->bgl", k_BGLP, own.dt_map.float()) + own.dt_bias.float()[:, None])
        dt_BGL = dt_BGL * left.enters_BL.unsqueeze(1)
        x_BGLQ = F.pad(left.v_BGLP.float(), (0, 1), value=1.0)

        def each(grouped: Tensor) -> Tensor:
            """[B, G, L, ...] as the scan takes it, [B, L, H, ...]."""
            return grouped.repeat_interleave(repeat, dim=1).transpose(1, 2)

        y_BLHQ, final = ssd(
            each(x_BGLQ),
            each(-dt_BGL * own.A_log.float().exp()[:, None]),
            each(scores_BGLN.softmax(-1)),
            C_BHLN.transpose(1, 2),
            w_BLH=each(dt_BGL),
            initial_state_BHPN=None if state_BGQN is None else state_BGQN.repeat_interleave(repeat, dim=1),
            segment_BL=None if left.segment_BL is None else left.segment_BL.to(torch.int32),
        )
        final_BGQN = final[:, ::repeat]
        if left.own_BL is not None:
            # the newest document may not have lost a token yet
            final_BGQN = final_BGQN * left.own_BL[:, -1, None, None, None]
        return torch.exp(top_BHL - over_BHL), y_BLHQ.transpose(1, 2), final_BGQN.contiguous()


def is_a_step(q_BHLP: Tensor, scores: Scores) -> bool:
    """Whether a call is of one token; an attention with a reach of its own or learned sinks takes the general path."""
    return q_BHLP.shape[2] == 1 and scores.reach is None and scores.logit_H is None


class WindowMixer(WindowedMixer):
    """`window`: the same without a state, which every window with a state has to beat."""

    kind = "window"
