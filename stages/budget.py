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
    units = [_step(stage, config.data.window) for stage in reading]
    floors = [_fewest(stage) * unit for stage, unit in zip(reading, units, strict=True)]
    if budget < sum(floors):
        raise fail("budget", f"every stage needs a step, {sum(floors)} tokens together", budget, "Raise it.")
    given: list[int] = []
    whole = sum(stage.tokens for stage in reading)
    for i, (stage, unit) in enumerate(zip(reading, units, strict=True)):
        most = (budget - sum(given) - sum(floors[i + 1 :])) // unit
        wanted = most if i + 1 == len(reading) else round(budget * stage.tokens / whole / unit)
        given.append(unit * max(_fewest(stage), min(wanted, most)))
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
