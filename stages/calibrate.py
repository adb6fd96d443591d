"""The calibration stage: reads windows from the packed data and lets convert/calibrate.py fit every mixer."""

from __future__ import annotations

import math
import time

from ssmorph.convert.calibrate import CalibrationOptions, LayerFit, calibrate

from .config import CALIBRATION_BATCH, CalibrateStage
from .context import Context


def run_calibrate(ctx: Context, index: int, stage: CalibrateStage) -> list[LayerFit]:
    """Fits `ctx.student` in place; a stop in the middle starts the stage over, since it takes minutes."""
    count = max(2, math.ceil(stage.tokens / (CALIBRATION_BATCH * ctx.config.data.window)))
    windows = [ctx.batch(index, step, CALIBRATION_BATCH).tokens_BL for step in range(count)]
    started = time.monotonic()
    total = len(ctx.student.mixers())
    fits: list[LayerFit] = []

    def progress(fit: LayerFit) -> None:
        fits.append(fit)
        left = (time.monotonic() - started) / len(fits) * (total - len(fits))
        kept = "" if fit.accepted else ", not better than the copy: copy kept"
        ctx.say(
            f"calibrate: layer {fit.layer} error {fit.error:.3f} (copy {fit.error_copy:.3g}){kept}, {left:.0f} s left"
        )
        ctx.stop.check()

    chosen = {name: getattr(stage, name) for name in ("decay", "inputs", "refine_steps", "refine_lr")}
    return calibrate(ctx.teacher, ctx.student, ctx.spec, windows, CalibrationOptions(**chosen), progress)
