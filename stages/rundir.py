"""The run directory: what is in it is whole. Atomic files and folders, one process at a time, DONE by content hash.

Everything is written beside its place and renamed, so a kill at any moment leaves the old state or the new one.
Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import fail

PARTIAL = ".partial-"
DONE = "DONE"


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns a full disk or a folder without permission into an error that says what is safe.

    Raises:
        ValueError: ENOSPC, EDQUOT, EACCES, EPERM or EROFS while writing.
    """
    rules = {
        errno.ENOSPC: ("the disk must have room", "Free some space"),
        errno.EDQUOT: ("the disk quota must have room", "Free some space"),
        errno.EACCES: ("the folder must be writable", "Change its permissions or use another run_dir"),
        errno.EPERM: ("the folder must be writable", "Change its permissions or use another run_dir"),
        errno.EROFS: ("the folder must be writable", "Use another run_dir"),
    }
    try:
        yield
    except OSError as error:
        if error.errno not in rules:
            raise
        rule, do = rules[error.errno]
        raise fail(
            str(path), rule, error.strerror, f"{do} and run the same command again: nothing saved was lost."
        ) from error


def atomic_write(path: Path, content: str | bytes) -> None:
    """Replaces a file as a whole: readers see the old content or the new."""
    data = content.encode() if isinstance(content, str) else content
    partial = path.with_name(f"{PARTIAL}{path.name}-{os.getpid()}")
    with disk_errors(path):
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        _sync_folder(path.parent)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder that becomes `path` on a clean exit and vanishes on an error."""
    partial = path.with_name(f"{PARTIAL}{path.name}-{os.getpid()}")
    with disk_errors(path):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            for file in sorted(partial.rglob("*")):
                if file.is_file():
                    with file.open("rb") as opened:
                        os.fsync(opened.fileno())
            for folder in [*(p for p in partial.rglob("*") if p.is_dir()), partial]:
                _sync_folder(folder)
            _replace_folder(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        _sync_folder(path.parent)


def remove_folder(path: Path) -> None:
    """Removes a folder by a rename first, so that a kill leaves it whole or gone; the next open sweeps the rest."""
    with disk_errors(path):
        shutil.rmtree(_aside(path))
        _sync_folder(path.parent)


def _aside(path: Path) -> Path:
    aside = path.with_name(f"{PARTIAL}old-{path.name}-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(path, aside)
    return aside


def _replace_folder(partial: Path, path: Path) -> None:
    """Puts `partial` in the place of `path`. A kill in between leaves neither, but never a part of one."""
    aside = _aside(path) if path.exists() else None
    try:
        os.replace(partial, path)
    except OSError:
        if aside:
            os.replace(aside, path)
        raise
    if aside:
        shutil.rmtree(aside)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def content_hash(folder: Path) -> str:
    """SHA-256 over the names and bytes of every file under `folder`."""
    total = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        total.update(str(file.relative_to(folder)).encode() + b"\0")
        total.update(file_hash(file).encode())
    return total.hexdigest()


def file_hash(file: Path) -> str:
    """SHA-256 of one file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


class RunDir:
    """One run's folder, held by one process until `close`."""

    def __init__(self, path: str | Path) -> None:
        """Opens or makes the folder, takes its lock, and sweeps what a killed process left half-written.

        Raises:
            ValueError: another process holds the run, or the folder cannot be written.
        """
        self.path = Path(path)
        with disk_errors(self.path):
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError) as error:
                raise fail("run_dir", "must be a folder", str(path), "Use another run_dir.") from error
            self._lock = (self.path / ".lock").open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "unknown"
            self._lock.close()
            raise fail(
                "run_dir", "one process per run", f"{path} is held by process {holder}", "Wait for it or stop it."
            ) from error
        with disk_errors(self.path):
            self._lock.truncate(0)
            self._lock.write(str(os.getpid()))
            self._lock.flush()
            for partial in [*self.path.glob(f"{PARTIAL}*"), *self.path.glob(f"*/{PARTIAL}*")]:
                shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
        self._mend_metrics()

    def close(self) -> None:
        """Gives the lock back; the kernel does it too when the process dies."""
        self._lock.close()

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file of the run atomically."""
        atomic_write(self.path / name, json.dumps(value, indent=1) + "\n")

    def read_json(self, name: str) -> Any:
        """Reads a JSON file of the run; None where it does not exist yet."""
        file = self.path / name
        return _json(file, "Delete it: it is made again.") if file.exists() else None

    def stage_dir(self, name: str) -> Path:
        """The folder of one stage, made if need be."""
        folder = self.path / name
        with disk_errors(folder):
            folder.mkdir(exist_ok=True)
        return folder

    def started(self, name: str) -> bool:
        """Whether a stage wrote anything."""
        folder = self.path / name
        return folder.is_dir() and any(folder.iterdir())

    def finished(self, name: str) -> bool:
        """Whether a stage says so, its artifact unread."""
        return (self.path / name / DONE).exists()

    def done(self, name: str) -> dict[str, Any] | None:
        """What a finished stage's DONE says, once its artifact is found to be what it was; None where not finished.

        Raises:
            ValueError: the artifact was changed or damaged since.
        """
        marker = self.path / name / DONE
        if not self.finished(name):
            return None
        record = _json(marker, "Delete the stage's folder to run it again.")
        artifact = self.path / name / "student"
        if not artifact.is_dir() or content_hash(artifact) != record["artifact"]:
            raise fail(
                str(artifact),
                "must be what the stage wrote",
                "other content",
                "Delete the stage's folder to run it again.",
            )
        return record

    def mark_done(self, name: str, source: str, summary: dict[str, Any]) -> str:
        """Ends a stage: DONE holds the hash of its artifact, of the artifact it was made from, and its summary."""
        artifact = content_hash(self.path / name / "student")
        record = {"artifact": artifact, "source": source, "summary": summary}
        atomic_write(self.path / name / DONE, json.dumps(record, indent=1))
        return artifact

    def log_metrics(self, record: dict[str, Any]) -> None:
        """Appends one line to metrics.jsonl."""
        with disk_errors(self.path / "metrics.jsonl"), (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def truncate_metrics(self, stage: str, step: int) -> None:
        """Drops this stage's lines after `step`, which the resumed run will write again.

        Raises:
            ValueError: a line in the middle that is not JSON; this program leaves none.
        """
        file = self.path / "metrics.jsonl"
        if not file.exists():
            return
        lines = file.read_bytes().splitlines(keepends=True)
        kept = [
            line for i, line in enumerate(lines, 1) if not _is_after(_record(line, f"{file}, line {i}"), stage, step)
        ]
        if len(kept) < len(lines):
            atomic_write(file, b"".join(kept))

    def _mend_metrics(self) -> None:
        """Drops a last line torn by a kill, before another could be written onto its end."""
        file = self.path / "metrics.jsonl"
        content = file.read_bytes() if file.exists() else b""
        if content and not content.endswith(b"\n"):
            atomic_write(file, content[: content.rfind(b"\n") + 1])


def _json(file: Path, do: str) -> Any:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise fail(str(file), "must be JSON", error, do) from error


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise fail(where, "must be a line of JSON", repr(line[:60]), "Delete that line.") from error
    return record if isinstance(record, dict) else {}


def _is_after(record: dict[str, Any], stage: str, step: int) -> bool:
    return record.get("stage") == stage and record.get("step", 0) > step
