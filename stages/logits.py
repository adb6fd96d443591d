"""End-to-end distillation: the student's next-token distribution towards the teacher's [MOHAWK, stage 3]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ssmorph.kernels.distill import distill_loss

from .config import LogitsStage
from .context import Context
from .data import TokenBatch
from .hidden import alignment_loss
from .loop import Trained, train


def run_logits(ctx: Context, index: int, stage: LogitsStage) -> Trained:
    """Runs or resumes the stage on `ctx.student`. No [tokens, vocabulary] tensor is held for both models."""
    student, teacher = ctx.student, ctx.teacher
    if stage.gradient_checkpointing:
        student.activation_checkpointing_enable()
        student.train()

    def step(batch: TokenBatch) -> dict[int, float]:
        tokens_BL = batch.tokens_BL
        with _outputs(ctx, teacher, stage.layer_weight > 0) as taught, torch.no_grad():
            taught_TD = teacher.base_model(tokens_BL, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        with _outputs(ctx, student, stage.layer_weight > 0) as own:
            own_TD = student.base_model(tokens_BL, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        labels_T, mask_T = tokens_BL[:, 1:].flatten(), batch.loss_mask_BL[:, 1:].flatten()
        loss = divergence(ctx, stage, own_TD, taught_TD, labels_T, mask_T)
        if stage.layer_weight:
            loss = loss + stage.layer_weight * _layer_term(own, taught)
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


def _layer_term(own: dict[int, Tensor], taught: dict[int, Tensor]) -> Tensor:
    terms = [alignment_loss(own[i], taught[i], "l2") for i in own]
    return torch.stack(terms).mean()


class _outputs:
    """Hooks that leave the converted blocks' outputs, taken before the final norm, in a dict while open."""

    def __init__(self, ctx: Context, model: Any, wanted: bool) -> None:
        self.blocks = ctx.spec.decoder_layers(model)
        self.layers = sorted(ctx.student.mixers()) if wanted else []
        self.seen: dict[int, Tensor] = {}

    def __enter__(self) -> dict[int, Tensor]:
        self.handles = [self.blocks[i].register_forward_hook(self._keep(i)) for i in self.layers]
        return self.seen

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _keep(self, index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple, output: Any) -> None:
            self.seen[index] = output[0] if isinstance(output, tuple) else output

        return hook
