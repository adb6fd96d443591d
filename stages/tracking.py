"""Trackers that mirror metrics.jsonl: none, wandb or TensorBoard. The run directory's file is always the record."""

from __future__ import annotations

import netrc
import os
import uuid
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from ..errors import fail
from .rundir import atomic_write

# beside the run's other files: a copied or moved run goes on with its curve, another of the same name has its own
ID = "wandb-id"


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
    """Weights & Biases; the run's id is kept in its folder, so a resumed run continues its curve.

    Without an API key the run is written offline under the run directory (`wandb sync` uploads it later): asking for a
    login would stop an unattended run. WANDB_MODE, where set, decides instead.
    """

    def __init__(self, run_dir: Path, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise fail("tracker", "wandb must be installed", "no such package", "Run: pip install wandb") from error
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
        if not (run_dir / ID).is_file():
            atomic_write(run_dir / ID, uuid.uuid4().hex)
        self._run = wandb.init(
            project="ssmorph",
            id=(run_dir / ID).read_text(encoding="utf-8"),
            name=run_dir.resolve().name,
            dir=run_dir,
            config=config,
            mode=mode,
            resume="allow",
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        """Logs with the stage's own step as a value, since wandb's step never goes back."""
        self._run.log({**values, "stage_step": step})

    def finish(self) -> None:
        """Ends the wandb run."""
        self._run.finish()


def _has_wandb_key() -> bool:
    """Whether wandb would find a key without asking: in the environment or in netrc, for the host it talks to."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    file = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        return host in netrc.netrc(file).hosts
    except FileNotFoundError:
        return False
    except netrc.NetrcParseError as error:
        raise fail(
            "tracker", "netrc must be readable to find the wandb key", error, "Mend it, or set WANDB_API_KEY."
        ) from error


class TensorBoardTracker:
    """TensorBoard event files under the run directory."""

    def __init__(self, run_dir: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise fail(
                "tracker", "tensorboard must be installed", "no such package", 'Run: pip install "ssmorph[tensorboard]"'
            ) from error
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
