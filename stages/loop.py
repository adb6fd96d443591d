"""The training loop of the three gradient stages: schedule, clipping, checkpoints, exact resume, and a clean stop.

Nothing random happens in a step, and batches are a pure function of (seed, stage, step); so weights, optimiser and one
integer are the whole state, and a resumed run equals an uninterrupted one bit for bit on the same machine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..errors import fail
from .checkpoint import latest_checkpoint, load_checkpoint, prune, save_checkpoint
from .config import TrainStage
from .context import Context, trained_parameters
from .data import TokenBatch
from .schedule import clip_each, depth_factors, optimizer, rate, set_rate

StepFunction = Callable[[TokenBatch], dict[int, float]]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a gradient stage reports: steps, tokens, first and last loss."""

    steps: int
    tokens: int
    first_loss: float
    last_loss: float


def total_steps(stage: TrainStage, window: int) -> int:
    """Steps that see at least `stage.tokens` tokens."""
    return math.ceil(stage.tokens / (stage.batch * window))


def train(ctx: Context, index: int, stage: TrainStage, step_function: StepFunction) -> Trained:
    """Runs or resumes one gradient stage on `ctx.student`, in place.

    `step_function` takes a batch, calls backward, and returns the loss of each layer (-1: the whole model).

    Raises:
        ValueError: a loss or gradient that is not finite; the last good checkpoint stays.
        Interrupted: a signal came; the state after the last step is saved.
    """
    loop = _Loop(ctx, index, stage)
    loop.resume()
    while loop.step < loop.steps:
        loop.one_step(step_function)
        due = loop.step % stage.checkpoint_every == 0 or loop.step == loop.steps
        if due or ctx.stop.signum is not None:
            loop.save()
        ctx.stop.check()
    return Trained(
        steps=loop.steps, tokens=loop.steps * loop.tokens_per_step, first_loss=loop.first, last_loss=loop.last
    )


class _Loop:
    def __init__(self, ctx: Context, index: int, stage: TrainStage) -> None:
        self.ctx, self.index, self.stage = ctx, index, stage
        self.name = ctx.config.stage_names()[index]
        self.folder = Path(ctx.run.stage_dir(self.name))
        self.steps = total_steps(stage, ctx.config.data.window)
        self.tokens_per_step = stage.batch * ctx.config.data.window
        self.step, self.first, self.last = 0, math.nan, math.nan
        self.started = time.monotonic()
        self.parameters = trained_parameters(ctx.student, stage.optim.rest_lr > 0)
        mixers = set(trained_parameters(ctx.student, rest=False))
        ctx.student.requires_grad_(False)
        for p in self.parameters.values():
            p.requires_grad_(True)
        chosen = {n: p for n, p in self.parameters.items() if n in mixers}
        rest = {n: p for n, p in self.parameters.items() if n not in mixers}
        count = len(ctx.spec.decoder_layers(ctx.student))
        factors = depth_factors({n: self._layer(n) for n in self.parameters}, count, stage.optim.depth_ratio)
        self.optim = optimizer(chosen, rest, stage.optim, factors)
        self.layers = self._layers()

    def _layer(self, name: str) -> int:
        """The decoder layer of a parameter, -1 for those outside."""
        prefix = self.ctx.spec.layers + "."
        return int(name.removeprefix(prefix).split(".")[0]) if name.startswith(prefix) else -1

    def _layers(self) -> dict[int, list[nn.Parameter]]:
        """Parameters whose gradient is clipped together, by decoder layer; -1 holds those outside."""
        if self.stage.optim.kind == "adamw":
            return {-1: list(self.parameters.values())}
        layers: dict[int, list[nn.Parameter]] = {}
        for name, p in self.parameters.items():
            layers.setdefault(self._layer(name), []).append(p)
        return layers

    def resume(self) -> None:
        """Continues from the newest whole checkpoint, if there is one."""
        newest = latest_checkpoint(self.folder)
        if newest is not None:
            tensors, optim, meta = load_checkpoint(newest)
            with torch.no_grad():
                for name, p in self.parameters.items():
                    p.copy_(tensors[name])
            self.optim.load_state_dict(optim)
            self.step, self.first, self.last = meta["step"], meta["first_loss"], meta["last_loss"]
            self.ctx.say(f"{self.name}: resumed at step {self.step} of {self.steps}")
            # a kill may have come between saving and dropping
            prune(self.folder, self.stage.keep)
        self.ctx.run.truncate_metrics(self.name, self.step)
        self.resumed_at = self.step

    def one_step(self, step_function: StepFunction) -> None:
        """One optimiser step; leaves the model untouched if the loss or a gradient is not finite."""
        batch = self.ctx.batch(self.index, self.step, self.stage.batch)
        share = rate(self.step, self.steps, self.stage.optim)
        set_rate(self.optim, share)
        self.optim.zero_grad(set_to_none=True)
        losses = step_function(batch)
        self._require_finite(losses, "loss", "Lower optim.lr, or lengthen optim.warmup_percent.")
        gradients = {i: [p.grad for p in ps if p.grad is not None] for i, ps in self.layers.items()}
        norms = clip_each({i: g for i, g in gradients.items() if g}, self.stage.optim.clip)
        self._require_finite(norms, "gradient norm", "Lower optim.lr or optim.clip.")
        self.optim.step()
        self.step += 1
        self.last = sum(losses.values()) / len(losses)
        self.first = self.last if math.isnan(self.first) else self.first
        self._report(losses, share)

    def _require_finite(self, values: dict[int, float], what: str, do: str) -> None:
        for layer, value in values.items():
            if not math.isfinite(value):
                where = f"{self.name} step {self.step}" + (f" layer {layer}" if layer >= 0 else "")
                raise fail(where, f"the {what} must be finite", value, f"{do} The last good checkpoint is kept.")

    def _report(self, losses: dict[int, float], share: float) -> None:
        record = {"stage": self.name, "step": self.step, "loss": self.last, "lr": self.stage.optim.lr * share}
        if len(losses) > 1:
            record["layers"] = {str(i): v for i, v in losses.items()}
        self.ctx.run.log_metrics(record)
        self.ctx.tracker.log(self.step, {f"{self.name}/{k}": v for k, v in record.items() if isinstance(v, float)})
        done = self.step - self.resumed_at
        speed = done / max(time.monotonic() - self.started, 1e-9)
        if done == 1 or self.step % 10 == 0 or self.step == self.steps:
            left = (self.steps - self.step) / speed
            rate_text = f"{speed * self.tokens_per_step:.0f} tokens/s, {left / 60:.1f} min left"
            self.ctx.say(f"{self.name}: step {self.step}/{self.steps} loss {self.last:.4f} ({rate_text})")

    def save(self) -> None:
        """Writes a checkpoint, whole or not at all, then drops older ones."""
        tensors = {name: p.detach() for name, p in self.parameters.items()}
        meta = {"step": self.step, "first_loss": self.first, "last_loss": self.last}
        save_checkpoint(
            self.folder / f"checkpoint-{self.step:06d}", tensors=tensors, optim=self.optim.state_dict(), meta=meta
        )
        prune(self.folder, self.stage.keep)
