"""The window controls, trained: the same layers, stages and tokens as the hybrid, without a state.

E is a window as large as all that the hybrid's converted layers hold; W, for a mixer with a window, is that window
alone. What states and kept heads are worth is the difference to E.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

from .config import HiddenStage, MixingStage, Stage, StudentConfig, TrainStage
from .context import Context
from .controls import SINKS, equal_window
from .nested import RunStages, staged_student
from .silence import own_window

FOLDER = "rivals"


def trained_windows(ctx: Context, run_stages: RunStages) -> list[tuple[str, Callable[[], Any]]]:
    """(name, loader) of the trained W and E of a finished student; a loader trains where that is not done yet."""
    mixers = ctx.student.mixers()
    if not mixers:
        return []
    window = equal_window(ctx.teacher, ctx.spec, mixers, ctx.config.data.window)
    own = own_window(mixers[min(mixers)])
    sinks = SINKS if own is None else own[1]
    students = {"window_trained": _window(ctx, sorted(mixers), window, sinks)}
    if own is not None:
        students = {"own_window_trained": _window(ctx, sorted(mixers), sum(own), sinks), **students}
    stages = tuple(_for_window(stage) for stage in ctx.config.stages)
    return [
        (name, partial(staged_student, ctx, f"{FOLDER}/{name}", student, stages, run_stages))
        for name, student in students.items()
    ]


def _for_window(stage: Stage) -> Stage:
    """The stage as a window can run it, in the same place, which is what its tokens and stored logits go by.

    A window has no mixing matrix to align: on those tokens its outputs are aligned instead.
    """
    if not isinstance(stage, MixingStage):
        return stage
    shared = {f.name: getattr(stage, f.name) for f in dataclasses.fields(TrainStage)}
    return HiddenStage(**shared)


def _window(ctx: Context, layers: list[int], window: int, sinks: int) -> StudentConfig:
    student = dataclasses.replace(ctx.config.student, mixer="window", layers=tuple(layers), window=window, sinks=sinks)
    return dataclasses.replace(student, heads=StudentConfig().heads)
