"""The tiny recipe as a subject of tests: a run in a forked child, where it can be killed, and what is compared."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ssmorph import verbs

RECIPE = Path(__file__).parents[2] / "configs" / "tiny.yaml"
# a run of about a second: five steps a stage with checkpoints after 2, 4 and 5, and no evaluation
QUICK = (
    "evaluate.suite=none", "stages.calibrate.tokens=384",
    *(f"stages.{i}.{key}" for i in (2, 3, 4) for key in ("tokens=480", "checkpoint_every=2")),
)  # fmt: skip
STAGES = ("0-surgery", "1-calibrate", "2-mixing", "3-hidden", "4-logits")


def run_tiny(folder: Path, *overrides: str, **options: Any) -> Path:
    """Runs or resumes the tiny recipe in this process."""
    # a fork after an operation on two threads would hang
    torch.set_num_threads(1)
    return verbs.convert(RECIPE, *QUICK, *overrides, run_dir=str(folder), say=options.pop("say", _silent), **options)


def _silent(_line: str) -> None:
    pass


def in_child(work: Callable[[], object], seconds: float = 60) -> int:
    """The exit code of `work` in a forked child: minus the signal's number where one ended it."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            for signum in (signal.SIGTERM, signal.SIGINT):
                signal.signal(signum, signal.SIG_DFL if signum == signal.SIGTERM else signal.default_int_handler)
            work()
            code = 0
        except Exception as error:
            code = getattr(error, "exit_code", 71)
            if code == 71:
                traceback.print_exc()
        finally:
            os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"the run did not end in {seconds} s")


def outcome(run: Path) -> dict[str, bytes]:
    """Every byte that must not depend on whether, or where, a run was interrupted."""
    names = [f"{stage}/student/student.safetensors" for stage in STAGES]
    names += [f"{stage}/DONE" for stage in STAGES]
    names += [str(p.relative_to(run)) for p in sorted(run.glob("*/checkpoint-*/*"))]
    return {name: (run / name).read_bytes() for name in [*names, "metrics.jsonl", "final/model.safetensors"]}


def assert_equal(run: Path, reference: Path) -> None:
    """Names the first files that differ."""
    ours, theirs = outcome(run), outcome(reference)
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if ours[name] != theirs[name]] == []
    assert list(run.rglob(".partial-*")) == []
    assert list(run.glob("*/layer-*")) == []


@contextlib.contextmanager
def disk_full(patch: Any, target: Any, name: str, when: Callable[..., bool]) -> Any:
    """While open, `target.name` raises ENOSPC where `when(*arguments)` says so."""
    original = getattr(target, name)

    def full(*args: Any, **kwargs: Any) -> Any:
        if when(*args):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    with patch.context() as inside:
        inside.setattr(target, name, full)
        yield
