"""Matrix orientation: each mixer's matrix towards the attention matrix, without L x L [MOHAWK, stage 1]."""

from __future__ import annotations

from ssmorph.convert.capture import MixerCall, captured
from ssmorph.convert.mixers import Mixer, scan_of
from ssmorph.kernels.mixing import mixing_loss

from ..errors import fail
from .config import MixingStage
from .context import Context
from .data import TokenBatch
from .hidden import teacher_body
from .loop import Trained, train


def run_mixing(ctx: Context, index: int, stage: MixingStage) -> Trained:
    """Runs or resumes the stage on `ctx.student`. out_proj and the gate get no gradient: they are not in the matrix."""
    mixers = ctx.student.mixers()
    if all(scan_of(mixer) is None for mixer in mixers.values()):
        do = "Keep fewer, or leave the stage out."
        raise fail("student.heads", "mixing aligns the heads that are not kept", "every head is kept", do)

    def step(batch: TokenBatch) -> dict[int, float]:
        with captured(ctx.teacher, ctx.spec, list(mixers), attention=True) as calls:
            teacher_body(ctx, batch.tokens_BL)
        return align_matrices(mixers, calls, stage.loss)

    return train(ctx, index, stage, step)


def align_matrices(mixers: dict[int, Mixer], calls: dict[int, MixerCall], kind: str) -> dict[int, float]:
    """Loss of every layer's matrix against the attention that was captured, after its backward; consumes `calls`."""
    losses = {}
    for layer, mixer in mixers.items():
        call = calls.pop(layer)
        scan = scan_of(mixer)
        if scan is None:
            # every head is kept; windows are refused by the recipe
            continue
        assert call.attended is not None
        s, a = scan[0].scan_inputs(call.input_BLD), call.attended.of(scan[1])
        q_BLHP, k_BLGP = a.q_BHLP.transpose(1, 2), a.k_BGLP.transpose(1, 2)
        loss = mixing_loss(
            s.C_BLGN, s.B_BLGN, s.log_a_BLH, q_BLHP, k_BLGP, w_BLH=s.w_BLH, D_H=s.D_H, scale=a.scale, window=a.window,
            softcap=a.softcap, sinks_H=a.sinks_H, valid_BL=a.valid_BL, loss=kind,
        )  # fmt: skip
        loss.backward()
        losses[layer] = loss.item()
    return losses
