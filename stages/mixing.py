"""Matrix orientation: each mixer's matrix towards the attention matrix, without L x L [MOHAWK, stage 1]."""

from __future__ import annotations

from torch import Tensor

from ssmorph.convert.capture import captured
from ssmorph.kernels.mixing import mixing_loss

from .config import MixingStage
from .context import Context
from .hidden import teacher_body
from .loop import Trained, train


def run_mixing(ctx: Context, index: int, stage: MixingStage) -> Trained:
    """Runs or resumes the stage on `ctx.student`. out_proj and the gate get no gradient: they are not in the matrix."""
    mixers = ctx.student.mixers()

    def step(tokens_BL: Tensor) -> dict[int, float]:
        with captured(ctx.teacher, ctx.spec, list(mixers), attention=True) as calls:
            teacher_body(ctx, tokens_BL)
        losses = {}
        for layer, mixer in mixers.items():
            call = calls.pop(layer)
            s = mixer.scan_inputs(call.input_BLD)
            assert call.attended is not None
            q_BLHP, k_BLGP = call.attended.q_BHLP.transpose(1, 2), call.attended.k_BGLP.transpose(1, 2)
            loss = mixing_loss(
                s.C_BLGN, s.B_BLGN, s.log_a_BLH, q_BLHP, k_BLGP,
                w_BLH=s.w_BLH, D_H=s.D_H, scale=call.attended.scale, loss=stage.loss,
            )  # fmt: skip
            loss.backward()
            losses[layer] = loss.item()
        return losses

    return train(ctx, index, stage, step)
