"""The calibration stage: reads windows from the packed data and lets convert/calibrate.py fit every mixer.

A fitted mixer is saved at once, since one layer of a large model takes minutes; a resumed run reads it back.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmorph.convert.calibrate import CalibrationOptions, LayerFit, calibrate
from ssmorph.convert.mixers import Mixer

from .checkpoint import is_whole, load_checkpoint, save_checkpoint
from .config import CALIBRATION_BATCH, CalibrateStage
from .context import Context
from .rundir import remove_folder

NO_OPTIMISER: dict[str, Any] = {"state": {}, "param_groups": []}


def run_calibrate(ctx: Context, index: int, stage: CalibrateStage) -> list[LayerFit]:
    """Fits `ctx.student` in place, from the first layer that is not fitted yet."""
    count = max(2, math.ceil(stage.tokens / (CALIBRATION_BATCH * ctx.config.data.window)))
    windows = [ctx.batch(index, step, CALIBRATION_BATCH).tokens_BL for step in range(count)]
    mixers: dict[int, Mixer] = ctx.student.mixers()
    folder = ctx.run.stage_dir(ctx.config.stage_names()[index])
    fitted = {layer: _restored(saved, mixers[layer]) for layer, saved in _saved(folder).items()}
    if fitted:
        ctx.say(f"calibrate: {len(fitted)} of {len(mixers)} layers are fitted already")
    started, done = time.monotonic(), 0

    def progress(fit: LayerFit) -> None:
        nonlocal done
        done += 1
        left = (time.monotonic() - started) / done * (len(mixers) - len(fitted) - done)
        kept = "" if fit.accepted else ", not better than the copy: copy kept"
        ctx.say(
            f"calibrate: layer {fit.layer} error {fit.error:.3f} (copy {fit.error_copy:.3g}){kept}, {left:.0f} s left"
        )
        tensors: dict[str, Tensor] = dict(mixers[fit.layer].named_parameters())
        save_checkpoint(
            folder / f"layer-{fit.layer}", tensors=tensors, optim=NO_OPTIMISER, meta=dataclasses.asdict(fit)
        )
        ctx.stop.check()

    chosen = {name: getattr(stage, name) for name in ("decay", "inputs", "refine_steps", "refine_lr")}
    return calibrate(ctx.teacher, ctx.student, ctx.spec, windows, CalibrationOptions(**chosen), progress, fitted)


def drop_fits(folder: Path) -> None:
    """Removes a finished stage's single layers: its artifact has them all."""
    for saved in folder.glob("layer-*"):
        remove_folder(saved)


def _saved(folder: Path) -> dict[int, Path]:
    found = {int(m[1]): path for path in folder.iterdir() if (m := re.fullmatch(r"layer-(\d+)", path.name))}
    return {layer: path for layer, path in found.items() if is_whole(path)}


@torch.no_grad()
def _restored(saved: Path, mixer: Mixer) -> LayerFit:
    tensors, _, fit = load_checkpoint(saved)
    for name, parameter in mixer.named_parameters():
        parameter.copy_(tensors[name])
    return LayerFit(**fit)
