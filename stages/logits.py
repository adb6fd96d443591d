"""End-to-end distillation: the student's next-token distribution towards the teacher's [MOHAWK, stage 3]."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmorph.convert.capture import run_layer
from ssmorph.kernels.distill import distill_loss

from .config import LogitsStage
from .context import Context
from .data import TokenBatch
from .hidden import BlockCall, alignment_loss, block_calls
from .loop import Trained, train


def run_logits(ctx: Context, index: int, stage: LogitsStage) -> Trained:
    """Runs or resumes the stage on `ctx.student`. No [tokens, vocabulary] tensor is held for both models."""
    student, teacher = ctx.student, ctx.teacher
    if stage.gradient_checkpointing:
        student.activation_checkpointing_enable()
        student.train()

    layers = sorted(student.mixers()) if stage.layer_weight else []

    def step(batch: TokenBatch) -> dict[int, float]:
        tokens_BL = batch.tokens_BL
        with block_calls(ctx, teacher, layers) as taught, torch.no_grad():
            taught_TD = teacher.base_model(tokens_BL, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        with block_calls(ctx, student, layers) as own:
            own_TD = student.base_model(tokens_BL, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        labels_T, mask_T = tokens_BL[:, 1:].flatten(), batch.loss_mask_BL[:, 1:].flatten()
        loss = divergence(ctx, stage, own_TD, taught_TD, labels_T, mask_T)
        if stage.layer_weight:
            loss = loss + stage.layer_weight * layer_term(ctx, stage, own, taught)
        loss.backward()
        return {-1: loss.item()}

    try:
        return train(ctx, index, stage, step)
    finally:
        if stage.gradient_checkpointing:
            student.activation_checkpointing_disable()
            student.eval()


def divergence(
    ctx: Context, stage: LogitsStage, own_TD: Tensor, taught_TD: Tensor, labels_T: Tensor, mask_T: Tensor
) -> Tensor:
    """The stage's loss from final hidden states, with both models' heads as their family computes logits."""
    own, taught = ctx.student.get_output_embeddings(), ctx.teacher.get_output_embeddings()
    scale, softcap = ctx.spec.logits(ctx.teacher.config)
    return distill_loss(
        own_TD, own.weight, taught_TD, taught.weight,
        loss=stage.loss, temperature=stage.temperature, beta=stage.jsd_beta,
        labels_T=labels_T if stage.ce_weight else None, ce_weight=stage.ce_weight, mask_T=mask_T,
        student_bias_V=own.bias, teacher_bias_V=taught.bias, student_scale=scale, teacher_scale=scale,
        student_softcap=softcap, teacher_softcap=softcap,
    )  # fmt: skip


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
