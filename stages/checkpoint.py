"""Checkpoints inside a stage: parameters, AdamW's state and the step, as safetensors and JSON, bit for bit.

manifest.json lists every file's hash and is written last inside a folder that appears by one rename.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import fail
from .rundir import atomic_folder, content_hash, file_hash, remove_folder

__all__ = ["checkpoints", "content_hash", "latest_checkpoint", "load_checkpoint", "prune", "save_checkpoint"]

MANIFEST = "manifest.json"


def save_checkpoint(folder: Path, *, tensors: dict[str, Tensor], optim: dict[str, Any], meta: dict[str, Any]) -> None:
    """Writes a checkpoint, whole or not at all.

    Args:
        optim: `state_dict()` of an optimiser whose state holds tensors.
        meta: anything JSON can hold exactly.

    Raises:
        ValueError: the disk is full or not writable; older checkpoints are untouched.
    """
    state = {f"{index}/{name}": value for index, values in optim["state"].items() for name, value in values.items()}
    with atomic_folder(folder) as partial, tensor_errors(folder):
        save_file(_plain(tensors), partial / "parameters.safetensors")
        save_file(_plain(state), partial / "optimizer.safetensors")
        groups = [{key: _tag(value) for key, value in group.items()} for group in optim["param_groups"]]
        (partial / "meta.json").write_text(json.dumps({"meta": meta, "groups": groups}))
        manifest = {file.name: file_hash(file) for file in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))


@contextlib.contextmanager
def tensor_errors(path: Path) -> Iterator[None]:
    """Turns what safetensors reports of a full disk, in its own class and without an errno, into a ValueError."""
    try:
        yield
    except SafetensorError as error:
        do = "Free some space and run the same command again: nothing saved was lost."
        raise fail(str(path), "must be written whole", error, do) from error


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _tag(value: Any) -> Any:
    """JSON knows no tuples; AdamW's betas are one."""
    return {"tuple": list(value)} if isinstance(value, tuple) else value


def _untag(value: Any) -> Any:
    return tuple(value["tuple"]) if isinstance(value, dict) and "tuple" in value else value


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """(tensors, optimiser state_dict, meta).

    Raises:
        ValueError: a file that is not what the manifest says.
    """
    try:
        for name, expected in _manifest(folder).items():
            if file_hash(folder / name) != expected:
                do = f"Delete {folder} to use the checkpoint before it."
                raise fail(str(folder / name), "must be what was saved", "other content", do)
        saved = json.loads((folder / "meta.json").read_text())
        tensors, state = load_file(folder / "parameters.safetensors"), load_file(folder / "optimizer.safetensors")
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise fail(str(folder), "must be a whole checkpoint", error, "Delete it to use the one before.") from error
    groups = [{key: _untag(value) for key, value in group.items()} for group in saved["groups"]]
    by_index: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        index, name = key.split("/", 1)
        by_index.setdefault(int(index), {})[name] = value
    return tensors, {"state": by_index, "param_groups": groups}, saved["meta"]


def checkpoints(stage: Path) -> list[Path]:
    """The stage's whole checkpoints, oldest first."""
    found = [folder for folder in stage.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", folder.name)]
    return sorted((folder for folder in found if is_whole(folder)), key=lambda folder: int(folder.name.split("-")[1]))


def is_whole(folder: Path) -> bool:
    """Whether every file is there; whether its content is right, load_checkpoint finds out."""
    return (folder / MANIFEST).is_file() and all((folder / name).is_file() for name in _manifest(folder))


def _manifest(folder: Path) -> dict[str, str]:
    """File name to hash."""
    try:
        manifest: dict[str, str] = json.loads((folder / MANIFEST).read_text())
    except ValueError as error:
        do = f"Delete {folder} to use the checkpoint before it."
        raise fail(str(folder / MANIFEST), "must be what was saved", "other content", do) from error
    return manifest


def latest_checkpoint(stage: Path) -> Path | None:
    """The newest whole checkpoint, if any."""
    found = checkpoints(stage)
    return found[-1] if found else None


def prune(stage: Path, keep: int) -> None:
    """Drops all but the newest `keep` whole ones, oldest first; a kill leaves each of them whole or gone."""
    assert keep > 0, keep
    for folder in checkpoints(stage)[:-keep]:
        remove_folder(folder)
