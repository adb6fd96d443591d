"""Hidden-state alignment: each mixer learns to answer its layer's input as attention does [MOHAWK, stage 2].

Teacher-forced: one teacher forward serves all layers, and no gradient crosses a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ssmorph.convert.capture import OWN, captured, run_layer

from .config import HiddenStage
from .context import Context
from .data import TokenBatch
from .loop import StepFunction, Trained, train


def run_hidden(ctx: Context, index: int, stage: HiddenStage) -> Trained:
    """Runs or resumes the stage on `ctx.student`."""
    step = _mixer_step(ctx, stage) if stage.target == "mixer" else _block_step(ctx, stage)
    return train(ctx, index, stage, step)


def alignment_loss(own_BLD: Tensor, taught_BLD: Tensor, kind: str) -> Tensor:
    """`l2`: mean over tokens of |own - taught|, over that of |taught|; `mse`: the same of squares.

    Relative, so that every layer weighs the same; vector_norm, because its gradient at 0 is 0 and not NaN.
    """
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
            loss = alignment_loss(mixer(calls[layer].input_BLD)[0], calls[layer].output_BLD, stage.loss)
            loss.backward()
            losses[layer] = loss.item()
        return losses

    return step


def _block_step(ctx: Context, stage: HiddenStage) -> StepFunction:
    mixers = ctx.student.mixers()
    blocks = ctx.spec.decoder_layers(ctx.student)

    def step(batch: TokenBatch) -> dict[int, float]:
        seen = _layer_states(ctx, list(mixers), batch.tokens_BL)
        losses = {}
        for layer in mixers:
            entered, left, kwargs = seen[layer]
            loss = alignment_loss(run_layer(blocks[layer], entered, kwargs) - entered, left - entered, stage.loss)
            loss.backward()
            losses[layer] = loss.item()
        return losses

    return step


def _layer_states(
    ctx: Context, layers: list[int], tokens_BL: Tensor
) -> dict[int, tuple[Tensor, Tensor, dict[str, Any]]]:
    """What enters and leaves the teacher's blocks; the last block's output is taken before the final norm."""
    seen: dict[int, tuple[Tensor, Tensor, dict[str, Any]]] = {}

    def keep(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            passed = {k: v for k, v in kwargs.items() if k not in OWN}
            seen[index] = (
                args[0] if args else kwargs["hidden_states"],
                output[0] if isinstance(output, tuple) else output,
                passed,
            )

        return hook

    blocks = ctx.spec.decoder_layers(ctx.teacher)
    handles = [blocks[i].register_forward_hook(keep(i), with_kwargs=True) for i in layers]
    try:
        teacher_body(ctx, tokens_BL)
    finally:
        for handle in handles:
            handle.remove()
    return seen
