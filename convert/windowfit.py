"""Closed-form start of the state behind a window: prototypes of the keys, and how much each head trusts them.

A query that met every old key at its prototype would answer as softmax attention over prototypes, each weighed by how
many keys it stands for. So the prototypes are the centres of a k-means of the layer's own keys as they leave the
window, and the query's map is the attention's scale times the same centres, turned by RoPE as a mean over distances:
how long ago a key left, the state does not know. How long it remembers, and one factor per head, the gate, which makes
up for that mean (the exponentials' would be larger), are chosen on the heads' outputs. Nothing is trained.

B batch, L length, T tokens, H query heads, G key/value heads, P head width, N prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmorph.kernels.common.rope import Tables

from .mixers import WindowedMixer
from .rope import averaged_back, tables_in
from .start import inverse_softplus
from .window import Window, empty

ROUNDS = 12
# a key shares itself out over prototypes by exp(-SHARP d^2 / mean d^2)
SHARP = 8.0
# mean distance over which the state forgets, in tokens: one is chosen for each key/value head
DISTANCES = (128.0, 256.0, 512.0, 1024.0, 2048.0, 1e4)
# how far behind the window a key may be when it is read, in tokens, spread evenly in the logarithm
READ = (1.0, 512.0)
GATES = (0.0, *(2.0 ** (power / 2) for power in range(-12, 7)))


@torch.no_grad()
def fit_state(
    mixer: WindowedMixer, inputs: Sequence[Tensor], heads_BLE: Sequence[Tensor], kwargs: dict[str, Any]
) -> None:
    """Writes prototypes, decay and gate into `mixer`.

    Args:
        inputs: what enters the layer's attention, [B, L, D] each.
        heads_BLE: what should reach its output projection.
        kwargs: the attention's other arguments, RoPE's tables among them.
    """
    if mixer.state is None:
        return
    calls = [attended(mixer, u, kwargs) for u in inputs]
    tables = tables_in(kwargs)
    _place(mixer, torch.cat([_left(mixer, k, tables) for _, k, *_ in calls], dim=1), calls[0][3].scale, tables)
    heads, groups, device = mixer.window_shape.heads, mixer.window_shape.groups, mixer.state.gate.device
    gates_V = torch.tensor(GATES, device=device)
    error_RVH = torch.zeros(len(DISTANCES), len(GATES), heads, dtype=torch.float64, device=device)
    mixer.state.gate.fill_(1)
    for (q, k, v, scores), taught in zip(calls, heads_BLE, strict=True):
        window = Window(empty(k, mixer.shape.window - mixer.shape.sinks, mixer.shape.sinks), k, v, None, None)
        near = window.near(q, scores)
        target = taught.unflatten(-1, (mixer.shape.heads, -1)).transpose(1, 2)[:, mixer.window_heads]
        for error_VH, distance in zip(error_RVH, DISTANCES, strict=True):
            mixer.state.A_log.fill_(-math.log(distance))
            shrink, far, _ = mixer.far(q, window, near.top_BHL, scores, None, tables)
            values, mass = near.values_BHLP * shrink.unsqueeze(-1), near.mass_BHL * shrink
            error_VH += gate_errors(values, mass, far, target, gates_V)
    best_RH, gate_RH = error_RVH.min(1)
    chosen_G = best_RH.unflatten(1, (groups, -1)).sum(-1).argmin(0)
    chosen_H = chosen_G.repeat_interleave(heads // groups)
    mixer.state.A_log.copy_(-torch.tensor(DISTANCES, device=device)[chosen_G].log())
    mixer.state.gate.copy_(gates_V[gate_RH.gather(0, chosen_H[None])[0]])


def gate_errors(near_BHLP: Tensor, mass_BHL: Tensor, far_BHLQ: Tensor, target_BHLP: Tensor, gates_V: Tensor) -> Tensor:
    """Squared errors of (near + gate far) / (mass + gate far's mass) for all gates, [V, H], float64.

    Expanded, so that a gate costs a few numbers for each token instead of all of its channels.
    """
    near, far, target = near_BHLP.double(), far_BHLQ[..., :-1].double(), target_BHLP.double()
    near_near, near_far, far_far = ((a * b).sum(-1) for a, b in ((near, near), (near, far), (far, far)))
    near_target, far_target, target_target = ((a * target).sum(-1) for a in (near, far, target))
    mass, far_mass = mass_BHL.double(), far_BHLQ[..., -1].double()
    errors = []
    for gate in gates_V.double():
        total = mass + gate * far_mass
        square = (near_near + 2 * gate * near_far + gate.square() * far_far) / total.square()
        errors.append((square - 2 * (near_target + gate * far_target) / total + target_target).sum((0, 2)))
    return torch.stack(errors)


def attended(mixer: WindowedMixer, hidden_BLD: Tensor, kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Queries, keys, values and scores of one call, as `Attend` has them, of the heads that have a window."""
    seen: list[tuple[Any, ...]] = []

    def attend(*arguments: Any) -> Tensor:
        seen.append(arguments)
        q_BHLP: Tensor = arguments[0]
        return torch.zeros_like(q_BHLP).transpose(1, 2)

    mixer.call_attention(hidden_BLD, attend, kwargs)
    return mixer.with_window(*seen[0])


def _left(mixer: WindowedMixer, k_BGLP: Tensor, tables: Tables | None) -> Tensor:
    """The keys that leave the window within the text, as the state sees them, [G, T, P]; all where none leaves."""
    size = mixer.shape.window - mixer.shape.sinks
    if k_BGLP.shape[2] > size:
        k_BGLP = k_BGLP[:, :, :-size]
        tables = None if tables is None else (tables[0][:, size:], tables[1][:, size:])
    return mixer.placeless(k_BGLP, tables).transpose(0, 1).flatten(1, 2)


def _place(mixer: WindowedMixer, k_GTP: Tensor, scale: float, tables: Tables | None) -> None:
    state, repeat = mixer.state, mixer.window_shape.heads // mixer.window_shape.groups
    assert state is not None
    centres_GNP, spread_G = prototypes(k_GTP, mixer.shape.state)
    sharp_G11 = (SHARP / spread_G.clamp_min(1e-12))[:, None, None]
    state.key_map.copy_(2 * sharp_G11 * centres_GNP)
    state.key_bias.copy_(-(sharp_G11 * centres_GNP.square()).sum(-1))
    if mixer.shape.turned:
        assert tables is not None
        low, high = (math.log10(edge) for edge in READ)
        distances = torch.logspace(low, high, 2000, dtype=torch.float64, device=centres_GNP.device).round()
        centres_GNP = averaged_back(centres_GNP, tables, distances)
    state.query_map.copy_((scale * centres_GNP).repeat_interleave(repeat, dim=0))
    state.query_bias.zero_()
    state.dt_map.zero_()
    state.dt_bias.copy_(inverse_softplus(torch.ones_like(state.dt_bias, dtype=torch.float64)))


def prototypes(k_GTP: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Centres of a k-means [Lloyd, 1982] of each group's keys, [G, N, P], and the mean squared distance to them, [G].

    A centre that no key is closest to stays where it was.
    """
    square_GT1 = k_GTP.square().sum(-1, keepdim=True)
    centres = _spread_keys(k_GTP, square_GT1, count)
    for _ in range(ROUNDS):
        nearest_GT = _distances(k_GTP, square_GT1, centres).argmin(-1)
        member_GTN = F.one_hot(nearest_GT, count).to(k_GTP.dtype)
        size_GN1 = member_GTN.sum(1).unsqueeze(-1)
        means = member_GTN.transpose(1, 2) @ k_GTP / size_GN1.clamp_min(1)
        centres = torch.where(size_GN1 > 0, means, centres)
    return centres, _distances(k_GTP, square_GT1, centres).amin(-1).mean(-1).clamp_min(0)


def _spread_keys(k_GTP: Tensor, square_GT1: Tensor, count: int) -> Tensor:
    """Keys to start from, [G, N, P]: drawn by squared distance to those before [Arthur, Vassilvitskii, 2007]."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(len(k_GTP), device=k_GTP.device)
    chosen = [k_GTP[:, 0]]
    apart_GT = k_GTP.new_full(k_GTP.shape[:2], math.inf)
    for _ in range(count - 1):
        new_GT = _distances(k_GTP, square_GT1, chosen[-1].unsqueeze(1))[..., 0]
        apart_GT = torch.minimum(apart_GT, new_GT.clamp_min(0))
        odds_GT = apart_GT.double().cpu() + 1e-30
        drawn_G = torch.multinomial(odds_GT, 1, generator=generator)[:, 0].to(k_GTP.device)
        chosen.append(k_GTP[groups, drawn_G])
    return torch.stack(chosen, dim=1)


def _distances(k_GTP: Tensor, square_GT1: Tensor, centres_GNP: Tensor) -> Tensor:
    """Squared distances of keys, whose squared lengths are known, [G, T, N]."""
    cross = k_GTP @ centres_GNP.transpose(1, 2)
    return square_GT1 - 2 * cross + centres_GNP.square().sum(-1).unsqueeze(1)
