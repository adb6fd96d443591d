"""Checkpoints inside a stage: parameters, AdamW's state and the step, as safetensors and JSON, bit for bit.

manifest.json lists every file's hash and is written last inside a folder that appears by one rename.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any


from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import fail
from .rundir import atomic_folder, file_hash

MANIFEST = "manifest.json"


def save_checkpoint(folder: Path, *, tensors: dict[str, Tensor], optim: dict[str, Any], meta: dict[str, Any]) -> None:
    """Writes a checkpoint, whole or not at all.

    Args:
        optim: `state_dict()` of an optimiser whose state holds tensors.
        meta: anything JSON can hold exactly.
    """
    state = {f"{index}/{name}": value for index, values in optim["state"].items() for name, value in values.items()}
    with atomic_folder(folder) as partial:
        save_file({n: t.contiguous() for n, t in tensors.items()}, partial / "parameters.safetensors")
        save_file({n: t.contiguous() for n, t in state.items()}, partial / "optimizer.safetensors")
        (partial / "meta.json").write_text(json.dumps({"meta": meta, "groups": optim["param_groups"]}))
        manifest = {file.name: file_hash(file) for file in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """(tensors, optimiser state_dict, meta).

    Raises:
        ValueError: a file that is not what the manifest says.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name, expected in manifest.items():
            if file_hash(folder / name) != expected:
                raise fail(str(folder / name), "must be what was saved", "other content", "Delete this checkpoint to use the one before.")
        saved = json.loads((folder / "meta.json").read_text())
        tensors, state = load_file(folder / "parameters.safetensors"), load_file(folder / "optimizer.safetensors")
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise fail(str(folder), "must be a whole checkpoint", error, "Delete it to use the one before.") from error
    by_index: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        index, name = key.split("/", 1)
        by_index.setdefault(int(index), {})[name] = value
    return tensors, {"state": by_index, "param_groups": saved["groups"]}, saved["meta"]


def checkpoints(stage: Path) -> list[Path]:
    """The stage's whole checkpoints, oldest first."""
    return sorted(folder for folder in stage.glob("checkpoint-*") if (folder / MANIFEST).is_file())


def latest_checkpoint(stage: Path) -> Path | None:
    """The newest whole checkpoint, if any."""
    found = checkpoints(stage)
    return found[-1] if found else None


def prune(stage: Path, keep: int) -> None:
    """Drops all but the newest `keep`, the manifest first, so that a half-deleted one is never taken for whole."""
    for folder in checkpoints(stage)[:-keep]:
        (folder / MANIFEST).unlink()
    for folder in stage.glob("checkpoint-*"):
        if not (folder / MANIFEST).exists():
            shutil.rmtree(folder)


