"""The step of a stage's newest whole checkpoint, from file names alone."""

from __future__ import annotations

from pathlib import Path


def newest_step(stage: Path) -> int | None:
    """The step, or None where there is no whole checkpoint."""
    whole = [folder for folder in stage.glob("checkpoint-*") if (folder / "manifest.json").is_file()]
    return max((int(folder.name.split("-")[1]) for folder in whole), default=None)
