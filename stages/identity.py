"""Whether a run's teacher is still the model that it began with: kept layers are read from it at every start."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ssmorph.convert.teachers import fingerprint, resolve

from ..errors import fail
from .config import TeacherConfig
from .rundir import RunDir

FILE = "teacher.json"


def check_teacher(run: RunDir, teacher: TeacherConfig, config: Any, anew: bool = False) -> None:
    """Notes what the teacher is at a run's first start, or where the run begins `anew`; later compares.

    Args:
        config: the teacher's, as loaded: of a hub id it tells the commit.

    Raises:
        ValueError: other weights, or a model of that name from elsewhere.
    """
    folder = Path(resolve(teacher.source))
    if folder.is_dir():
        files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
        text = "".join(f"{file.name} {fingerprint(file)}\n" for file in files)
        found = {"folder": hashlib.sha256(text.encode()).hexdigest()}
    else:
        found = {"commit": str(getattr(config, "_commit_hash", None))}
    saved = run.read_json(FILE)
    if saved is None or anew:
        run.write_json(FILE, found)
    elif saved != found:
        do = "Give it back, use another run_dir, or begin anew with --from surgery."
        raise fail("teacher.source", "must be the model that the run began with", f"another {teacher.source}", do)
