"""Hidden-state alignment: each mixer learns to answer its layer's input as attention does [MOHAWK, stage 2].

Teacher-forced: one teacher forward serves all layers, and no gradient crosses a layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmorph.convert.capture import OWN, captured, run_layer

from .config import HiddenStage
from .context import Context
from .data import TokenBatch
from .loop import StepFunction, Trained, train


class BlockCall(NamedTuple):
    """What entered and left a decoder block, [B, L, D] both (the last block's before the final norm), and the rest."""

    entered_BLD: Tensor
    left_BLD: Tensor
    kwargs: dict[str, Any]


def run_hidden(ctx: Context, index: int, stage: HiddenStage) -> Trained:
    """Runs or resumes the stage on `ctx.student`."""
    step = _mixer_step(ctx, stage) if stage.target == "mixer" else _block_step(ctx, stage)
    return train(ctx, index, stage, step)


def alignment_loss(own_BLD: Tensor, taught_BLD: Tensor, kind: str) -> Tensor:
    """`l2`: mean over tokens of |own - taught|, over that of |taught|; `mse`: the same of squares; `cosine`: 1 - cos.

    Relative, so that every layer weighs the same; vector_norm, because its gradient at 0 is 0 and not NaN.
    """
    if kind == "cosine":
        return (1 - F.cosine_similarity(own_BLD.float(), taught_BLD.float(), dim=-1)).mean()
    gap, size = own_BLD.float() - taught_BLD.float(), taught_BLD.float()
    if kind == "mse":
        return gap.square().sum() / size.square().sum().clamp_min(1e-12)
    return torch.linalg.vector_norm(gap, dim=-1).mean() / torch.linalg.vector_norm(size, dim=-1).mean().clamp_min(1e-6)


def teacher_body(ctx: Context, tokens_BL: Tensor) -> Any:
    """The teacher without its head; what hooks see is what matters."""
    with torch.no_grad():
        return ctx.teacher.base_model(tokens_BL, use_cache=False)


def _mixer_step(ctx: Context, stage: HiddenStage) -> StepFunction:
    mixers = ctx.student.mixers()

    def step(batch: TokenBatch) -> dict[int, float]:
        with captured(ctx.teacher, ctx.spec, list(mixers), attention=False) as calls:
            teacher_body(ctx, batch.tokens_BL)
        losses = {}
        for layer, mixer in mixers.items():
            loss = alignment_loss(
                mixer(calls[layer].input_BLD, **calls[layer].kwargs)[0], calls[layer].output_BLD, stage.loss
            )
            loss.backward()
            losses[layer] = loss.item()
        return losses

    return step


def _block_step(ctx: Context, stage: HiddenStage) -> StepFunction:
    mixers = ctx.student.mixers()
    blocks = ctx.spec.decoder_layers(ctx.student)

    def step(batch: TokenBatch) -> dict[int, float]:
        with block_calls(ctx, ctx.teacher, list(mixers)) as seen:
            teacher_body(ctx, batch.tokens_BL)
        losses = {}
        for layer in mixers:
            entered, left, kwargs = seen[layer]
            loss = alignment_loss(run_layer(blocks[layer], entered, kwargs) - entered, left - entered, stage.loss)
            loss.backward()
            losses[layer] = loss.item()
        return losses

    return step


@contextlib.contextmanager
def block_calls(ctx: Context, model: Any, layers: list[int]) -> Iterator[dict[int, BlockCall]]:
    """While open, every forward of `model` leaves the calls of its blocks `layers` in the yielded dict."""
    calls: dict[int, BlockCall] = {}

    def keep(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            passed = {k: v for k, v in kwargs.items() if k not in OWN}
            entered = args[0] if args else kwargs["hidden_states"]
            calls[index] = BlockCall(entered, output[0] if isinstance(output, tuple) else output, passed)

        return hook

    blocks = ctx.spec.decoder_layers(model)
    handles = [blocks[i].register_forward_hook(keep(i), with_kwargs=True) for i in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
