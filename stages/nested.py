"""Students that a run makes beside its own, by the same stages in run directories below it: they resume as any run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from .config import EvaluateConfig, PlacementConfig, RunConfig, Stage, StudentConfig
from .context import Context
from .recipe import dump, load_saved
from .rundir import RunDir, atomic_write, remove_folder
from .tracking import NoTracker

# what runs a context's stages on these layers up to an index: the pipeline, which imports this module's callers
RunStages = Callable[[Context, tuple[int, ...], int], None]


def staged_student(
    ctx: Context, place: str, student: StudentConfig, stages: tuple[Stage, ...], run_stages: RunStages
) -> Any:
    """What `stages` make of `student`, whose layers are listed; resumed where the folder `place` is of the same."""
    assert not isinstance(student.layers, str)
    folder = ctx.run.path / place
    config = dataclasses.replace(plain_config(ctx.config, stages), run_dir=str(folder), student=student)
    if (folder / "config.yaml").is_file():
        # the run may have been moved, or its folder be written otherwise
        saved = dataclasses.replace(load_saved(folder), run_dir=config.run_dir)
        if saved != config:
            remove_folder(folder)
    ctx.run.stage_dir(place.partition("/")[0])

    def say(text: str) -> None:
        ctx.say(f"{place.replace('/', ' ')}: {text}")

    # the evaluator, which asks for some, works without gradients
    with RunDir(folder) as run, torch.enable_grad():
        atomic_write(folder / "config.yaml", dump(config))
        own = dataclasses.replace(ctx, config=config, run=run, student=None, say=say, tracker=NoTracker())
        run_stages(own, student.layers, len(stages) - 1)
    own.student.requires_grad_(False)
    return own.student


def plain_config(config: RunConfig, stages: tuple[Stage, ...]) -> RunConfig:
    """The part of a recipe that such a student depends on."""
    return dataclasses.replace(
        config, run_dir="nested", stages=stages, student=dataclasses.replace(config.student, layers="all"),
        placement=PlacementConfig(probes=config.placement.probes), evaluate=EvaluateConfig(), threads=None,
        tracker="none",
    )  # fmt: skip
