"""Closed-form initialisation of the mixers from a few thousand tokens: decay, gate, convolution, output projection.

The layers are walked in order with teacher and student side by side, so each is fitted on what it will really see, the
student's own hidden states, and corrects what the layers before it got wrong. Normal equations stream in float64;
memory does not grow with the tokens. Nothing is trained.

B batch, L length, D model width, H heads, P head width, E = H*P, T = B*L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .capture import MixerCall, attention_rows, captured, first_hidden, layer_kwargs, run_layer
from .families import FamilySpec
from .headfit import balanced_basis, fit_heads
from .mixers import Mixer
from .mixers.discrete_mamba2 import GATE_OPEN
from .mixers.mamba2 import Mamba2Mixer
from .surgery import conv_rows, gate_rows, set_decay

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# share of the windows that choose the ridge and decide whether the fit is accepted
HELD_OUT = 0.15
HEAD_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """What the closed forms may use; `correct` is the share of the accumulated error a layer is asked to undo."""

    decay: Literal["output", "distance"] = "output"
    tap_scale: float = 0.2
    fills: tuple[float, ...] = (0.01, 1.0, 100.0)
    inputs: Literal["student", "teacher"] = "student"
    correct: float = 0.0


@dataclass(frozen=True, kw_only=True)
class LayerFit:
    """How well one layer came out: relative squared error of the mixer's output on held-out windows."""

    layer: int
    ridge: float
    fill: float
    error_copy: float
    error_removed: float
    error: float
    accepted: str


class Moments:
    """Streaming normal equations of a linear map from features to targets: F'F, F'Y and |Y|^2 in float64."""

    def __init__(self, features: int, targets: int, device: torch.device) -> None:
        self.gram_FF = torch.zeros(features, features, dtype=torch.float64, device=device)
        self.cross_FT = torch.zeros(features, targets, dtype=torch.float64, device=device)
        self.target_square = 0.0

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Adds tokens: features [..., F] and targets [..., T]."""
        f, t = features.flatten(0, -2), targets.flatten(0, -2)
        # the products of a few thousand tokens are exact enough in float32; their sum over the corpus is not
        self.gram_FF += f.T @ f
        self.cross_FT += f.T @ t
        self.target_square += float(t.double().square().sum())

    def solve(self, ridge: float, prior_TF: Tensor) -> Tensor:
        """Weight [T, F] that minimises |Y - F W'|^2 + ridge * |W - prior|^2 with each feature at its own scale."""
        scale_F = self.gram_FF.diagonal().clamp_min(1e-30)
        prior_FT = prior_TF.T.double()
        system = self.gram_FF + torch.diag(ridge * scale_F)
        return (prior_FT + torch.linalg.solve(system, self.cross_FT - self.gram_FF @ prior_FT)).T

    def error(self, weight_TF: Tensor) -> float:
        """|Y - F W'|^2 / |Y|^2."""
        w = weight_TF.T.double()
        residual = self.target_square - 2 * (w * self.cross_FT).sum() + (w * (self.gram_FF @ w)).sum()
        return float(residual) / max(self.target_square, 1e-30)


@torch.no_grad()
def calibrate(
    teacher: nn.Module,
    student: Any,
    spec: FamilySpec,
    windows: list[Tensor],
    options: CalibrationOptions,
    progress: Callable[[LayerFit], None] = lambda fit: None,
) -> list[LayerFit]:
    """Fits every mixer of `student` in place, from the first layer to the last.

    Args:
        windows: token batches [B, L], all of one shape; the last 15 % only judge.

    Returns:
        One LayerFit per converted layer.
    """
    teacher_layers, student_layers = spec.decoder_layers(teacher), spec.decoder_layers(student)
    kwargs = layer_kwargs(teacher, spec, windows[0])
    mixers: dict[int, Mixer] = student.mixers()
    taught = [first_hidden(teacher, spec, tokens) for tokens in windows]
    own = list(taught)
    judge = max(1, round(HELD_OUT * len(windows)))
    fits = []
    for index in range(max(mixers) + 1 if mixers else 0):
        if index in mixers:
            fit = _Layer(teacher, student, spec, index, kwargs[index], options).fit(taught, own, judge)
            fits.append(fit)
            progress(fit)
        else:
            for b, hidden in enumerate(taught):
                same = own[b] is hidden
                taught[b] = run_layer(teacher_layers[index], hidden, kwargs[index])
                own[b] = taught[b] if same else run_layer(student_layers[index], own[b], kwargs[index])
    return fits


class _Layer:
    """The fit of one converted layer."""

    def __init__(
        self, teacher: nn.Module, student: Any, spec: FamilySpec, index: int, kwargs: dict[str, Any], options: CalibrationOptions
    ) -> None:
        self.teacher, self.spec, self.index, self.kwargs, self.options = teacher, spec, index, kwargs, options
        self.teacher_layer = spec.decoder_layers(teacher)[index]
        self.student_layer = spec.decoder_layers(student)[index]
        self.mixer: Mixer = student.mixers()[index]

    def fit(self, taught: list[Tensor], own: list[Tensor], judge: int) -> LayerFit:
        """Fits the mixer, then moves both hidden states behind the layer, in place."""
        calls, moved = self._teacher_pass(taught)
        inputs = [self._norm(h) for h in own] if self.options.inputs == "student" else [c.input_BLD for c in calls]
        share = self.options.correct if self.options.inputs == "student" else 0.0
        targets = [c.output_BLD + share * (t - o) for c, t, o in zip(calls, taught, own, strict=True)]
        fit = self._fit(calls, inputs, targets, judge)
        for b, hidden in enumerate(own):
            own[b] = run_layer(self.student_layer, hidden, self.kwargs)
            taught[b] = moved[b]
        return fit

    def _norm(self, hidden_BLD: Tensor) -> Tensor:
        return self.student_layer.get_submodule(self.spec.mixer_norm)(hidden_BLD)

    def _teacher_pass(self, taught: list[Tensor]) -> tuple[list[MixerCall], list[Tensor]]:
        calls, moved = [], []
        self._distance = _Distance(self.mixer.shape.heads)
        with captured(self.teacher, self.spec, [self.index], attention=True) as seen:
            for hidden in taught:
                moved.append(run_layer(self.teacher_layer, hidden, self.kwargs))
                call = seen[self.index]
                if self.options.decay == "distance":
                    self._distance.add(call)
                calls.append(call._replace(attended=None))
        return calls, moved

    def _fit(self, calls: list[MixerCall], inputs: list[Tensor], targets: list[Tensor], judge: int) -> LayerFit:
        mixer, split = self.mixer, len(inputs) - judge
        before = {name: p.clone() for name, p in mixer.named_parameters()}
        held_copy = self._moments(inputs[split:], targets[split:]).error(mixer.out_proj.weight)
        _fit_gate(mixer, inputs[:split])
        self._fit_heads(calls[:split], inputs[:split])
        prior = mixer.out_proj.weight.detach().clone()
        best = None
        for fill in self.options.fills if isinstance(mixer, Mamba2Mixer) else (0.0,):
            self._fill_norm(fill, inputs[:split])
            self._match_scale(calls[:split], inputs[:split])
            train, held = self._moments(inputs[:split], targets[:split]), self._moments(inputs[split:], targets[split:])
            for ridge in RIDGES:
                weight = train.solve(ridge, prior)
                error = held.error(weight)
                if best is None or error < best[0]:
                    best = (error, ridge, fill, weight)
        error, ridge, fill, weight = best
        accepted = "calibrated" if error < min(held_copy, 1.0) else "copy"
        if accepted == "calibrated":
            self._fill_norm(fill, inputs[:split])
            self._match_scale(calls[:split], inputs[:split])
            mixer.out_proj.weight.copy_(weight)
        else:
            for name, p in mixer.named_parameters():
                p.copy_(before[name])
        return LayerFit(layer=self.index, ridge=ridge, fill=fill, error_copy=held_copy, error_removed=1.0, error=error, accepted=accepted)

    def _fit_heads(self, calls: list[MixerCall], inputs: list[Tensor]) -> None:
        mixer, shape = self.mixer, self.mixer.shape
        few = range(max(1, HEAD_TOKENS // inputs[0][..., 0].numel()))
        u = torch.cat([inputs[i] for i in few if i < len(inputs)])
        o = torch.cat([calls[i].heads_BLE for i in few if i < len(inputs)]).unflatten(-1, (shape.heads, -1))
        rows, bias = conv_rows(mixer), mixer.conv1d.bias
        sizes = [shape.inner, shape.groups * shape.state, shape.groups * shape.state]
        x, B, C = (torch.nn.functional.linear(u, rows, bias)).split(sizes, dim=-1)
        x, B, C = x.unflatten(-1, (shape.heads, -1)), B.unflatten(-1, (shape.groups, -1)), C.unflatten(-1, (shape.groups, -1))
        to_C, to_B = (t.to(u.dtype) for t in balanced_basis(C.flatten(0, 1), B.flatten(0, 1)))
        B, C = torch.einsum("gnm,blgm->blgn", to_B, B), torch.einsum("gnm,blgm->blgn", to_C, C)
        head = fit_heads(C[..., :-1], B[..., :-1], x, o, self._distance.solve() if self.options.decay == "distance" else None)
        self.head = head
        gamma = head.gamma_H.to(u.dtype)
        level_G = B[..., :-1].square().mean((0, 1, 3)).sqrt()
        for part, change in ((1, to_B), (2, to_C * gamma[:, None, None])):
            block = slice(sum(sizes[:part]), sum(sizes[: part + 1]))
            for t in (rows, bias):
                new = torch.einsum("gnm,gm...->gn...", change, t[block].unflatten(0, (shape.groups, -1)))
                new[:, -1] = 0
                t[block] = new.flatten(0, 1)
        constant_B = shape.inner + torch.arange(1, shape.groups + 1) * shape.state - 1
        constant_C = constant_B + shape.groups * shape.state
        bias[constant_B] = level_G
        bias[constant_C] = head.beta_H.to(u.dtype) / level_G
        D_H = head.delta_H
        dt_H = None
        if isinstance(mixer, Mamba2Mixer):
            taps, tap_x, dt_H = _fit_taps(mixer, u, self.options.tap_scale)
            constant = torch.cat([constant_B, constant_C])
            wanted = 0.5 * (taps * bias)[constant]
            mixer.conv1d.weight[:, 0, -1] = taps
            bias.mul_(taps)
            bias[constant] = _inverse_silu(wanted)
            D_H = D_H * 2 / tap_x
        mixer.D.copy_(D_H)
        set_decay(mixer, head.distance_H, dt_H)

    def _fill_norm(self, fill: float, inputs: list[Tensor]) -> None:
        """Scales each head so that its mean square is `fill` x eps: far below 1 the norm is linear, far above it normalises."""
        mixer, shape = self.mixer, self.mixer.shape
        if not isinstance(mixer, Mamba2Mixer):
            return
        mixer.norm.weight.fill_(1)
        tokens = sum(u[..., 0].numel() for u in inputs[:4]) * shape.head_dim
        # RMS norm is undone where it can be: y = f / sqrt(1 - f^2) up to eps
        squares = torch.stack([_scan_squares(mixer, u) for u in inputs[:4]]).sum(0) / tokens
        factor_H = (fill * shape.eps / squares).sqrt()
        scale_scan(mixer, factor_H)

    def _match_scale(self, calls: list[MixerCall], inputs: list[Tensor]) -> None:
        """Brings the features to the size of the teacher's head outputs, so that the copied W_o is a sensible prior."""
        mixer, shape = self.mixer, self.mixer.shape
        own = sum(_head_squares(mixer.features(u), shape.heads) for u in inputs[:4])
        taught = sum(_head_squares(c.heads_BLE, shape.heads) for c in calls[:4])
        ratio_H = (taught / own.clamp_min(1e-30)).sqrt().to(mixer.out_proj.weight.dtype)
        per_channel = ratio_H.repeat_interleave(shape.head_dim)
        if isinstance(mixer, Mamba2Mixer):
            mixer.norm.weight.mul_(per_channel)

    def _moments(self, inputs: list[Tensor], targets: list[Tensor]) -> Moments:
        weight = self.mixer.out_proj.weight
        moments = Moments(weight.shape[1], weight.shape[0], weight.device)
        for u, y in zip(inputs, targets, strict=True):
            bias = self.mixer.out_proj.bias
            moments.add(self.mixer.features(u), y if bias is None else y - bias)
        return moments


def _head_squares(features_BLE: Tensor, heads: int) -> Tensor:
    return features_BLE.double().unflatten(-1, (heads, -1)).square().sum((0, 1, 3))


def _fit_gate(mixer: Mixer, inputs: list[Tensor]) -> None:
    """Opens the stock gate, which has no bias: the row g with g.u closest to silu^-1(1), repeated over all channels."""
    if not isinstance(mixer, Mamba2Mixer):
        return
    width = mixer.shape.hidden
    moments = Moments(width, 1, mixer.in_proj.weight.device)
    for u in inputs:
        moments.add(u, u.new_full((*u.shape[:-1], 1), GATE_OPEN))
    gate_rows(mixer).copy_(moments.solve(1e-4, mixer.in_proj.weight.new_zeros(1, width)))


def _fit_taps(mixer: Mixer, u: Tensor, tap_scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Scales the last tap so that SiLU sees values near `tap_scale`, where it is nearly v/2; also the dt that restores the product.

    silu(v) = v/2 + v^2/4 - ..., so x, B and C shrink by eps/2 each, and dt = 8 P^-1/2 / (eps_x eps_B eps_C).
    """
    shape = mixer.shape
    blocks = shape.heads * [shape.head_dim] + 2 * shape.groups * [shape.state]
    sample = torch.nn.functional.linear(u, conv_rows(mixer), mixer.conv1d.bias).flatten(0, 1)
    quantiles = torch.stack([b.abs().flatten().kthvalue(math.ceil(0.999 * b.numel())).values for b in sample.split(blocks, dim=-1)])
    tap_S = tap_scale / quantiles.double().clamp_min(1e-12)
    per_channel = tap_S.repeat_interleave(torch.tensor(blocks, device=tap_S.device))
    tap_x, tap_B, tap_C = tap_S.split([shape.heads, shape.groups, shape.groups])
    return per_channel.to(u.dtype), tap_x, 8 / (tap_x * tap_B * tap_C)


def _inverse_silu(value: Tensor) -> Tensor:
    """v with silu(v) = value, on the increasing branch, by Newton's method from v = 2 value."""
    v = (2 * value.double()).clamp_min(-1.0)
    for _ in range(20):
        s = torch.sigmoid(v)
        v = v - (v * s - value) / (s * (1 + v * (1 - s))).clamp_min(1e-3)
    return v.to(value.dtype)


def _scan_squares(mixer: Mamba2Mixer, u: Tensor) -> Tensor:
    gate, channels, decay = mixer._split(mixer.in_proj(u))
    y = mixer._scan(channels, decay, None, None, None).flatten(-2)
    return _head_squares(y * torch.nn.functional.silu(gate), mixer.shape.heads)


def scale_scan(mixer: Mamba2Mixer, factor_H: Tensor) -> None:
    """Multiplies each head's scan output by a factor and leaves its decay as it is."""
    dt = torch.nn.functional.softplus(mixer.dt_bias.double())
    new = dt * factor_H
    mixer.dt_bias.copy_(new + torch.log(-torch.expm1(-new)))
    mixer.A_log.copy_(mixer.A_log.double() - factor_H.log())
    mixer.D.mul_(factor_H)


class _Distance:
    """Each head's attention distance, and the decay whose truncated geometric profile has the same [METHOD, decay].

    The mean distance alone is biased by the window (uniform attention gives L/4), so the decay a solves
    sum_t r_t mu_{t-1}(a) = sum A (t - s), mu_K(a) = sum_k k a^k / sum_k a^k over k <= K; the first token is left out.
    """

    def __init__(self, heads: int) -> None:
        self.mass_HL: Tensor | None = None
        self.distance_H = torch.zeros(heads, dtype=torch.float64)

    def add(self, call: MixerCall) -> None:
        assert call.attended is not None
        heads, length = call.attended.q_BHLP.shape[1:3]
        if self.mass_HL is None:
            self.mass_HL = torch.zeros(heads, length, dtype=torch.float64)
        for start, rows_BHRL in attention_rows(call.attended):
            count, width = rows_BHRL.shape[-2:]
            queries = torch.arange(start, start + count).unsqueeze(-1)
            gap_RL = (queries - torch.arange(width)).clamp_min(0)[:, 1:].to(rows_BHRL.device)
            kept = rows_BHRL[..., 1:]
            self.mass_HL[:, start : start + count] += kept.sum((0, 3)).double().cpu()
            self.distance_H += (kept * gap_RL).sum((0, 2, 3)).double().cpu()

    def solve(self) -> Tensor:
        """Mean distance 1/(1/a - 1) of each head's untruncated profile, by bisection on log a."""
        assert self.mass_HL is not None
        low, high = torch.full_like(self.distance_H, 0.05), torch.full_like(self.distance_H, 1e5)
        for _ in range(40):
            middle = (low * high).sqrt()
            too_short = self._expected(middle) < self.distance_H
            low, high = torch.where(too_short, middle, low), torch.where(too_short, high, middle)
        return (low * high).sqrt()

    def _expected(self, distance_H: Tensor) -> Tensor:
        assert self.mass_HL is not None
        steps = torch.arange(self.mass_HL.shape[1], dtype=torch.float64)
        weight_HL = torch.exp(-torch.log1p(1 / distance_H).unsqueeze(-1) * steps)
        mean_HL = (weight_HL * steps).cumsum(-1) / weight_HL.cumsum(-1)
        # row t looks back over t - 1 gaps, since token 0 is left out
        return (self.mass_HL[:, 1:] * mean_HL[:, :-1]).sum(-1)
