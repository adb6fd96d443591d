"""The repository as files: what the house tests look at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "ssmorph"
CODE_ROOMS = ("kernels", "convert", "stages")
ROOMS = (*CODE_ROOMS, "configs")
# .git is a file in a worktree, and names the checkout that it belongs to
NOT_OURS = {".git", "__pycache__", "build", "dist", "runs", "wandb", "shared"}


def ours(folder: Path) -> Iterator[Path]:
    """Files under `folder` that belong to the project: no links, hidden folders (but .ci), builds or runs."""
    for path in sorted(folder.iterdir()):
        hidden = path.name.startswith(".") and path.name != ".ci"
        if path.is_symlink() or path.name in NOT_OURS or path.name.endswith(".egg-info"):
            continue
        if path.is_dir() and not hidden:
            yield from ours(path)
        elif path.is_file():
            yield path


def shipped() -> list[str]:
    """Paths, relative to the wheel's root, of every file a wheel has to hold."""
    kinds = {".py", ".yaml", ".c", ".h", ".css"}
    inside = [path for room in ROOMS for path in ours(ROOT / room) if path.suffix in kinds]
    names = [path.relative_to(ROOT).as_posix() for path in inside]
    names += [path.name for path in PACKAGE.glob("*.py")]
    return sorted(f"ssmorph/{name}" for name in [*names, "py.typed"])
