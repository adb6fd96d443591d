"""Initialisation of the mixers from a few thousand tokens: decay, gate, convolution, output projection in closed form.

The layers are walked in order with teacher and student side by side, so each is fitted on what it will really see, the
student's own hidden states. Normal equations stream in float64. A few gradient steps may follow (refine.py).

B batch, L length, D model width, H heads, G groups, P head width, N state width, E = H*P.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .capture import MixerCall, attention_rows, captured, first_hidden, layer_kwargs, run_layer
from .families import FamilySpec
from .headfit import HeadFit, balanced_basis, fit_heads, or_one
from .linearise import fill_norm, open_gate, shrink_taps
from .mixers import AttendingMixer, Mixer, ScanMixer, WindowedMixer, scan_of
from .mixers.mamba2 import Mamba2Mixer
from .moments import Moments
from .refine import refine
from .start import conv_bias, conv_rows, set_decay
from .windowfit import fit_state

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# share of the windows that choose the ridge and decide whether the fit is accepted
HELD_OUT = 0.15
# tokens that the head fits use; the ridge uses all
HEAD_TOKENS = 4096
# relative error of an attention that is deleted
ERROR_REMOVED = 1.0


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """Where decays come from (a head's output, or its attention distance), and whose hidden states are fitted.

    `refine_steps` gradient steps follow the closed forms in every layer, the first at a rate of `refine_lr`.
    """

    decay: Literal["output", "distance"] = "output"
    inputs: Literal["student", "teacher"] = "student"
    refine_steps: int = 0
    refine_lr: float = 1e-3


@dataclass(frozen=True, kw_only=True)
class LayerFit:
    """How one layer came out: relative squared error of the mixer's output on held-out windows (removed: 1)."""

    layer: int
    ridge: float
    error_copy: float
    error: float
    accepted: bool


@torch.no_grad()
def calibrate(
    teacher: nn.Module,
    student: Any,
    spec: FamilySpec,
    windows: list[Tensor],
    options: CalibrationOptions,
    progress: Callable[[LayerFit], None] = lambda fit: None,
    fitted: Mapping[int, LayerFit] | None = None,
) -> list[LayerFit]:
    """Fits every mixer of `student` in place, from the first layer to the last.

    Args:
        windows: token batches [B, L], all of one shape; the last 15 % only judge.
        progress: called when a layer is fitted.
        fitted: layers whose mixer is fitted already; the others come out as if all were fitted now, bit for bit.

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
            layer = _Layer(teacher, student, spec, index, kwargs[index], options)
            known = (fitted or {}).get(index)
            fits.append(layer.fit(taught, own, judge, known))
            if known is None:
                progress(fits[-1])
        else:
            for b, hidden in enumerate(taught):
                same = own[b] is hidden
                taught[b] = run_layer(teacher_layers[index], hidden, kwargs[index])
                own[b] = taught[b] if same else run_layer(student_layers[index], own[b], kwargs[index])
    return fits


class _Layer:
    """The fit of one converted layer."""

    def __init__(
        self,
        teacher: nn.Module,
        student: Any,
        spec: FamilySpec,
        index: int,
        kwargs: dict[str, Any],
        options: CalibrationOptions,
    ) -> None:
        self.teacher, self.spec, self.index, self.kwargs, self.options = teacher, spec, index, kwargs, options
        self.teacher_layer = spec.decoder_layers(teacher)[index]
        self.student_layer = spec.decoder_layers(student)[index]
        self.mixer: Mixer = student.mixers()[index]
        self.attention_kwargs = {k: v for k, v in kwargs.items() if k not in ("attention_mask", "position_ids")}

    def fit(self, taught: list[Tensor], own: list[Tensor], judge: int, known: LayerFit | None = None) -> LayerFit:
        """Fits the mixer unless its fit is `known`, then moves both hidden states behind the layer, in place."""
        calls, moved = self._teacher_pass(taught)
        if known is None:
            inputs = [self._norm(h) for h in own] if self.options.inputs == "student" else [c.input_BLD for c in calls]
            known = self._fit(calls, inputs, [c.output_BLD for c in calls], judge)
        for b, hidden in enumerate(own):
            own[b] = run_layer(self.student_layer, hidden, self.kwargs)
            taught[b] = moved[b]
        return known

    def _norm(self, hidden_BLD: Tensor) -> Tensor:
        name = self.spec.mixer_norm(self.teacher.config)
        return hidden_BLD if name is None else self.student_layer.get_submodule(name)(hidden_BLD)

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
        split = len(inputs) - judge
        before = self._snapshot()
        error_copy = self._moments(inputs[split:], targets[split:]).error(self.mixer.output().weight)
        self._fit_heads(calls[:split], inputs[:split])
        ridge, error = self._project(inputs, targets, judge)
        if self.options.refine_steps:
            solved = self._snapshot()
            self._refine(inputs[:split], targets[:split])
            refined = self._project(inputs, targets, judge)
            if refined[1] < error:
                ridge, error = refined
            else:
                self._restore(solved)
        accepted = error < min(error_copy, ERROR_REMOVED)
        if not accepted:
            self._restore(before)
        return LayerFit(layer=self.index, ridge=ridge, error_copy=error_copy, error=error, accepted=accepted)

    def _refine(self, inputs: list[Tensor], targets: list[Tensor]) -> None:
        output = self.mixer.output()
        own = _fitted(self.mixer) | dict(output.named_parameters(prefix="output"))
        steps, lr = self.options.refine_steps, self.options.refine_lr
        refine(own, lambda u_BLD: output(self._features(u_BLD)), inputs, targets, steps, lr)

    def _project(self, inputs: list[Tensor], targets: list[Tensor], judge: int) -> tuple[float, float]:
        """Solves for the output projection; returns the ridge and its error on held-out windows."""
        split, output = len(inputs) - judge, self.mixer.output()
        prior = output.weight.detach().clone()
        train, held = self._moments(inputs[:split], targets[:split]), self._moments(inputs[split:], targets[split:])
        solved = [(ridge, train.solve(ridge, prior)) for ridge in RIDGES]
        ridge, weight = min(solved, key=lambda choice: held.error(choice[1]))
        output.weight.copy_(weight)
        return ridge, held.error(weight)

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: p.clone() for name, p in self.mixer.named_parameters()}

    def _restore(self, snapshot: dict[str, Tensor]) -> None:
        for name, p in self.mixer.named_parameters():
            p.copy_(snapshot[name])

    def _fit_heads(self, calls: list[MixerCall], inputs: list[Tensor]) -> None:
        """Writes the head fit into the mixer: rows of B and C, their constant channel, D and the decay."""
        count, scan = self.mixer.shape.heads, scan_of(self.mixer)
        if isinstance(self.mixer, WindowedMixer):
            fit_state(self.mixer, inputs, [c.heads_BLE for c in calls], self.attention_kwargs)
        if scan is None:
            return
        mixer, heads = scan
        few = max(1, HEAD_TOKENS // inputs[0][..., 0].numel())
        u_BLD = torch.cat(inputs[:few])
        taught = [c.heads_BLE.unflatten(-1, (count, -1))[..., list(heads), :] for c in calls[:few]]
        distance_H = self._distance.solve()[list(heads)] if self.options.decay == "distance" else None
        constants, head = _place_heads(mixer, u_BLD, torch.cat(taught), distance_H)
        dt_H, D_H = None, head.delta_H
        if isinstance(mixer, Mamba2Mixer):
            open_gate(mixer, inputs)
            shrink_x, dt_H = shrink_taps(mixer, u_BLD, constants)
            D_H = D_H / shrink_x
        mixer.D.copy_(D_H)
        set_decay(mixer, head.distance_H, dt_H)
        if isinstance(mixer, Mamba2Mixer):
            fill_norm(mixer, inputs[:few], [t.flatten(-2) for t in taught])

    def _moments(self, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Moments:
        weight, bias = self.mixer.output().weight, self.mixer.output().bias
        moments = Moments(weight.shape[1], weight.shape[0], weight.device)
        for u, y in zip(inputs, targets, strict=True):
            moments.add(self._features(u), y if bias is None else y - bias)
        return moments

    def _features(self, u_BLD: Tensor) -> Tensor:
        if isinstance(self.mixer, AttendingMixer):
            return self.mixer.features(u_BLD, **self.attention_kwargs)
        assert isinstance(self.mixer, ScanMixer)
        return self.mixer.features(u_BLD)


def _place_heads(
    mixer: ScanMixer, u_BLD: Tensor, heads_BLHP: Tensor, distance_H: Tensor | None
) -> tuple[Tensor, HeadFit]:
    """Rotates B and C into their balanced basis, fits the heads, and gives the last channel to the constant.

    The convolution becomes the identity. Returns the constant channels' indices and the fit.
    """
    shape, rows, bias = mixer.shape, conv_rows(mixer), conv_bias(mixer)
    mixer.conv1d.weight.zero_()
    mixer.conv1d.weight[:, 0, -1] = 1
    state = shape.groups * shape.state
    x, B, C = F.linear(u_BLD, rows, bias).split([shape.inner, state, state], dim=-1)
    x_BLHP = x.unflatten(-1, (shape.heads, -1))
    B_BLGN, C_BLGN = (t.unflatten(-1, (shape.groups, -1)) for t in (B, C))
    to_C, to_B = (t.to(u_BLD.dtype) for t in balanced_basis(C_BLGN.flatten(0, 1), B_BLGN.flatten(0, 1)))
    B_BLGN, C_BLGN = torch.einsum("gnm,blgm->blgn", to_B, B_BLGN), torch.einsum("gnm,blgm->blgn", to_C, C_BLGN)
    head = fit_heads(C_BLGN[..., :-1], B_BLGN[..., :-1], x_BLHP, heads_BLHP, distance_H)
    gamma, beta = head.gamma_H.to(u_BLD.dtype), head.beta_H.to(u_BLD.dtype)
    level_G = or_one(B_BLGN[..., :-1].square().mean((0, 1, 3)).sqrt())
    for start, change in ((shape.inner, to_B), (shape.inner + state, to_C * gamma[:, None, None])):
        block = slice(start, start + state)
        for tensor in (rows, bias):
            new = torch.einsum("gnm,gm...->gn...", change, tensor[block].unflatten(0, (shape.groups, -1)))
            new[:, -1] = 0
            tensor[block] = new.flatten(0, 1)
    last_B = shape.inner + torch.arange(1, shape.groups + 1, device=bias.device) * shape.state - 1
    bias[last_B], bias[last_B + state] = level_G, beta / level_G
    return torch.cat([last_B, last_B + state]), head


def _fitted(mixer: Mixer) -> dict[str, nn.Parameter]:
    """What calibration may move besides the output projection: the scan, or the state behind a window."""
    scan = scan_of(mixer)
    if scan is not None:
        own: nn.Module | None = scan[0]
    else:
        own = mixer.state if isinstance(mixer, WindowedMixer) else None
    parameters = {} if own is None else dict(own.named_parameters())
    return {name: p for name, p in parameters.items() if not name.startswith("out_proj.")}


class _Distance:
    """Each head's attention distance, and the decay whose truncated geometric profile has the same.

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
