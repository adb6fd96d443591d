"""Gates under a budget: every layer has its attention and its mixer, and learns how much of the attention to keep.

A layer's output is g attention(x) + (1 - g) mixer(x), 0 < g < 1. The gates alone are trained, on KL. Their sum is the
number of layers kept, always, by a shift common to all logits: what one gate gains, others give.

B batch, L length, D model width, T tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ssmorph.convert.families import FamilySpec

from .config import LogitsStage
from .context import Context
from .targets import divergence, end_of, final_states

# root mean square, over the layers, of the first step's change of the logits; it falls to 0
RATE = 0.5
MOMENTUM = 0.9
# the order of batches is drawn from the stage's number: one behind calibration, which is 1
STREAM = 2


@dataclass
class GateState:
    """All that training is after a step: logits of the gates, and the running mean of their gradient."""

    step: int
    logits: list[float]
    mean: list[float]


def train_gates(
    ctx: Context, student: Any, kept: int, state: GateState | None, save: Callable[[GateState], None]
) -> list[float]:
    """The gates of all layers after `placement.train_tokens` tokens, the larger the more its attention is missed.

    Args:
        student: every layer converted and calibrated; not changed.
        kept: layers that may keep their attention.
        state: where an earlier process stopped; `save` is called after every step.

    Raises:
        Interrupted: a signal came; the last step is saved.
    """
    total = len(ctx.spec.decoder_layers(ctx.teacher))
    steps = math.ceil(ctx.config.placement.train_tokens / ctx.config.data.window)
    # half a layer inside, where there is nothing to choose
    budget = min(max(kept, 0.5), total - 0.5)
    state = state or GateState(0, [0.0] * total, [0.0] * total)
    own = dataclasses.replace(ctx, student=student)
    while state.step < steps:
        logits = torch.tensor(state.logits, requires_grad=True)
        loss = _loss(own, on_budget(logits, budget), state.step)
        (slope,) = torch.autograd.grad(loss, logits)
        mean = MOMENTUM * torch.tensor(state.mean) + (1 - MOMENTUM) * slope
        # one scale for all layers, so that the differences between their gradients decide
        move = RATE * (1 - state.step / steps) * mean / mean.square().mean().sqrt().clamp_min(1e-12)
        state = GateState(state.step + 1, (logits.detach() - move).tolist(), mean.tolist())
        save(state)
        ctx.say(f"placement gates: step {state.step}/{steps} loss {loss.item():.4f}")
        ctx.stop.check()
    return on_budget(torch.tensor(state.logits), budget).tolist()


def on_budget(logits: Tensor, budget: float) -> Tensor:
    """sigmoid(logits - shift) with the shift at which they sum to `budget`; differentiable, the shift included."""
    low, high = logits.detach().double().min() - 40, logits.detach().double().max() + 40
    for _ in range(60):
        shift = (low + high) / 2
        above = (logits.detach().double() - shift).sigmoid().sum() > budget
        low, high = (shift, high) if above else (low, shift)
    gates = (logits - shift).sigmoid()
    # a step of Newton from the solution: it moves nothing, and has the shift's own gradient
    return (logits - shift - (gates.sum() - budget) / (gates * (1 - gates)).sum().detach()).sigmoid()


def _loss(ctx: Context, gates: Tensor, step: int) -> Tensor:
    batch = ctx.batch(STREAM, step, 1)
    scaling = ctx.spec.logits(ctx.teacher.config)
    with torch.no_grad():
        taught = end_of(ctx.teacher, scaling, final_states(ctx.teacher, batch.tokens_BL))
    with blended(ctx.student, ctx.teacher, ctx.spec, gates.float().to(ctx.device())):
        own = end_of(ctx.student, scaling, final_states(ctx.student, batch.tokens_BL))
    labels_T, mask_T = batch.tokens_BL[:, 1:].flatten(), batch.loss_mask_BL[:, 1:].flatten()
    return divergence(LogitsStage(), [taught], [1.0], own, labels_T, mask_T).cpu()


class Blend(nn.Module):
    """Called as a self-attention is, and answers as this layer's does."""

    def __init__(self, attention: nn.Module, mixer: nn.Module, gate: Tensor) -> None:
        super().__init__()
        self.attention, self.mixer, self.gate = attention, mixer, gate

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """g attention + (1 - g) mixer, [B, L, D]."""
        kept, own_BLD = self.attention(*args, **kwargs), self.mixer(*args, **kwargs)[0]
        rest = kept[1:] if isinstance(kept, tuple) else None
        kept_BLD = kept[0] if isinstance(kept, tuple) else kept
        mixed_BLD = own_BLD + self.gate * (kept_BLD - own_BLD)
        return mixed_BLD if rest is None else (mixed_BLD, *rest)


@contextlib.contextmanager
def blended(hybrid: Any, teacher: Any, spec: FamilySpec, gates: Tensor) -> Iterator[None]:
    """While open, converted layer i is gates[i] of the teacher's attention and 1 - gates[i] of its mixer."""
    own, (path, _, name) = spec.decoder_layers(hybrid), spec.mixer.rpartition(".")
    mixers = hybrid.mixers()
    try:
        for i, mixer in mixers.items():
            setattr(own[i].get_submodule(path), name, Blend(spec.attention(teacher, i), mixer, gates[i]))
        yield
    finally:
        for i, mixer in mixers.items():
            setattr(own[i].get_submodule(path), name, mixer)
