"""A recipe cut or stretched to a budget of tokens: its stages keep their proportions. Standard library only."""

from __future__ import annotations

import dataclasses

from ..errors import fail
from .config import CALIBRATION_BATCH, CalibrateStage, RunConfig, Stage, SurgeryStage, TrainStage


def spread(config: RunConfig, budget: int) -> RunConfig:
    """`config` with at most `budget` tokens in all, calibration's included, shared out as its stages' tokens are.

    A stage gets whole steps and one at least; what rounding leaves goes to the last.

    Raises:
        ValueError: a budget too small for a step of every stage, or a recipe in which no stage reads tokens.
    """
    reading = [s for s in config.stages if isinstance(s, CalibrateStage | TrainStage)]
    if not reading:
        raise fail("budget", "needs a stage that reads tokens", budget, "Leave it out.")
    given, left = [], budget
    for stage in reading:
        unit = _step(stage, config.data.window)
        share = budget * stage.tokens / sum(s.tokens for s in reading)
        steps = left // unit if stage is reading[-1] else max(_fewest(stage), round(share / unit))
        given.append(steps * unit)
        left -= given[-1]
    if left < 0 or given[-1] < _fewest(reading[-1]) * _step(reading[-1], config.data.window):
        floor = sum(_fewest(s) * _step(s, config.data.window) for s in reading)
        raise fail("budget", f"every stage needs a step, {floor} tokens together", budget, "Raise it, or drop a stage.")
    tokens = iter(given)
    stages: list[Stage] = [
        s if isinstance(s, SurgeryStage) else dataclasses.replace(s, tokens=next(tokens)) for s in config.stages
    ]
    return dataclasses.replace(config, stages=tuple(stages))


def _step(stage: CalibrateStage | TrainStage, window: int) -> int:
    """Tokens of one step."""
    return window * (CALIBRATION_BATCH if isinstance(stage, CalibrateStage) else stage.batch)


def _fewest(stage: CalibrateStage | TrainStage) -> int:
    """Calibration keeps a batch to be judged on."""
    return 2 if isinstance(stage, CalibrateStage) else 1
