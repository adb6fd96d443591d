"""End-to-end distillation: the student's next-token distribution towards the teacher's [MOHAWK, stage 3]."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ssmorph.convert.capture import run_layer
from ssmorph.convert.families import FamilySpec

from .config import LogitsStage
from .context import Context
from .data import TokenBatch
from .hidden import BlockCall, alignment_loss, block_calls, teacher_body
from .loop import Trained, train
from .offline import Stored
from .targets import Live, Target, end_of, final_states


def run_logits(ctx: Context, index: int, stage: LogitsStage) -> Trained:
    """Runs or resumes the stage on `ctx.student`. No [tokens, vocabulary] tensor is held for any model."""
    student, teacher = ctx.student, ctx.teacher
    target: Target = Live(ctx, stage) if stage.offline is None else Stored(ctx, index, stage)
    layers, logits = sorted(student.mixers()) if stage.layer_weight else [], ctx.spec.logits(teacher.config)

    def step(batch: TokenBatch) -> dict[int, float]:
        tokens_BL = batch.tokens_BL
        with block_calls(ctx, teacher, layers) as taught:
            distance = target.read(batch)
            if layers and not target.runs_own:
                teacher_body(ctx, tokens_BL)
        with block_calls(ctx, student, layers) as own:
            own_TD = final_states(student, tokens_BL)
        labels_T, mask_T = tokens_BL[:, 1:].flatten(), batch.loss_mask_BL[:, 1:].flatten()
        loss = distance(end_of(student, logits, own_TD, target.vocabulary), labels_T, mask_T)
        if stage.layer_weight:
            loss = loss + stage.layer_weight * layer_term(ctx, stage, own, taught)
        loss.backward()
        return {-1: loss.item()}

    with checkpointed(student, ctx.spec) if stage.gradient_checkpointing else contextlib.nullcontext():
        return train(ctx, index, stage, step)


@contextlib.contextmanager
def checkpointed(model: Any, spec: FamilySpec) -> Iterator[None]:
    """While open, blocks keep what enters them and compute the rest again for their gradients; nothing else changes."""
    model.activation_checkpointing_enable()
    for block in spec.decoder_layers(model):
        # transformers asks the block itself; what is inside it stays in eval mode, its dropout with it
        block.training = True
    try:
        yield
    finally:
        model.activation_checkpointing_disable()
        model.eval()


def layer_term(ctx: Context, stage: LogitsStage, own: dict[int, BlockCall], taught: dict[int, BlockCall]) -> Tensor:
    """How far the converted blocks' outputs are from the teacher's [MaTVLM, equation of its layer-wise loss].

    `frobenius` is the sum over layers of |own - taught| over a whole window, per token like the divergence beside it.
    """
    blocks = ctx.spec.decoder_layers(ctx.student)
    terms = []
    for i, call in taught.items():
        forced = stage.layer_inputs == "teacher"
        out_BLD = run_layer(blocks[i], call.entered_BLD, call.kwargs) if forced else own[i].left_BLD
        if stage.layer_loss == "l2":
            terms.append(alignment_loss(out_BLD, call.left_BLD, "l2") / len(taught))
        else:
            gap = (out_BLD.float() - call.left_BLD.float()).flatten(1)
            terms.append(torch.linalg.vector_norm(gap, dim=1).mean() / out_BLD.shape[1])
    return torch.stack(terms).sum()
