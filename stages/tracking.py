"""Trackers that mirror metrics.jsonl: none, wandb or TensorBoard. The file in the run directory is always the record."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

from ..errors import fail


class Tracker(Protocol):
    """Takes numbers by name."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """One step's numbers."""

    def finish(self) -> None:
        """Flushes and ends."""


class NoTracker:
    """Tracks nothing."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Does nothing."""

    def finish(self) -> None:
        """Does nothing."""


class WandbTracker:
    """Weights & Biases; the run's id is the folder's name, so a resumed run continues its curve. Offline without a key."""

    def __init__(self, run_dir: Path, config: dict[str, Any]) -> None:
        if "WANDB_API_KEY" not in os.environ and not (Path.home() / ".netrc").exists():
            os.environ.setdefault("WANDB_MODE", "offline")
        import wandb

        self._run = wandb.init(project="ssmorph", id=run_dir.name, dir=run_dir, config=config, resume="allow")

    def log(self, step: int, values: dict[str, float]) -> None:
        """Logs with the stage's own step as a value, since wandb's step never goes back."""
        self._run.log({**values, "stage_step": step})

    def finish(self) -> None:
        """Ends the wandb run."""
        self._run.finish()


class TensorBoardTracker:
    """TensorBoard event files under the run directory."""

    def __init__(self, run_dir: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise fail("tracker", "tensorboard must be installed", "no such package", 'Run: pip install "ssmorph[tensorboard]"') from error
        self._writer = SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, step: int, values: dict[str, float]) -> None:
        """One scalar per name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        """Writes what is buffered."""
        self._writer.close()


def make_tracker(name: str, run_dir: Path, config: dict[str, Any]) -> Tracker:
    """The tracker a recipe asks for."""
    if name == "wandb":
        return WandbTracker(run_dir, config)
    return TensorBoardTracker(run_dir) if name == "tensorboard" else NoTracker()
