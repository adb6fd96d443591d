"""A run that was killed anywhere and resumed equals the uninterrupted one byte for byte.

Kills are SIGKILL at the n-th call of a function that the run goes through, so they fall where the seed says.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssmorph.convert import calibrate
from ssmorph.stages import calibrate as calibrate_stage
from ssmorph.stages import checkpoint, loop, pipeline, rundir

from .tiny_run import assert_equal, in_child, run_tiny

# function -> (module that calls it, name)
PLACES: dict[str, tuple[Any, str]] = {
    "any rename": (os, "replace"),
    "any fsync": (os, "fsync"),
    "tensors of a checkpoint": (checkpoint, "save_file"),
    "hash for a manifest": (checkpoint, "file_hash"),
    "pruning": (checkpoint, "remove_folder"),
    "training step": (loop, "set_rate"),
    "metrics line": (rundir.RunDir, "log_metrics"),
    "calibration": (calibrate_stage, "calibrate"),
    "fitted layer": (calibrate_stage, "save_checkpoint"),
    "dropping fitted layers": (calibrate_stage, "remove_folder"),
    "artifact": (pipeline, "save_student"),
    "final": (pipeline, "model_card"),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference") / "run"
    run_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory, reference: Path) -> dict[str, int]:
    """How often an uninterrupted run goes through each place, so that seeded kills are spread over all of it."""
    found = dict.fromkeys(PLACES, 0)
    with pytest.MonkeyPatch.context() as patch:
        for place in PLACES:
            _on_call(patch, place, lambda _n, place=place: found.__setitem__(place, found[place] + 1))
        run_tiny(tmp_path_factory.mktemp("counted") / "run")
    assert all(found.values()), found
    return found


def _on_call(patch: pytest.MonkeyPatch, place: str, act: Callable[[int], None]) -> None:
    """Calls `act(n)` before the n-th call, from 1, of a place."""
    target, name = PLACES[place]
    original, calls = getattr(target, name), [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        act(calls[0])
        return original(*args, **kwargs)

    patch.setattr(target, name, counted)


def killed(folder: Path, place: str, nth: int, signum: int = signal.SIGKILL, **options: Any) -> int:
    """Runs or resumes in a child that signals itself at the n-th call of a place; its exit code."""

    def work() -> None:
        def act(n: int) -> None:
            if n == nth:
                os.kill(os.getpid(), signum)

        with pytest.MonkeyPatch.context() as patch:
            _on_call(patch, place, act)
            run_tiny(folder, **options)

    return in_child(work)


@pytest.mark.parametrize("place", list(PLACES))
def test_a_killed_run_resumes_to_the_same_bytes(
    tmp_path: Path, reference: Path, counts: dict[str, int], place: str
) -> None:
    run = tmp_path / "run"
    nth = random.Random(place).randint(1, counts[place])
    assert killed(run, place, nth) == -signal.SIGKILL, nth
    run_tiny(run)
    assert_equal(run, reference)


@pytest.mark.parametrize("stage", [2, 3, 4])
def test_a_kill_inside_each_checkpoint_of_a_stage(tmp_path: Path, reference: Path, stage: int) -> None:
    run = tmp_path / "run"
    # three checkpoints a stage, and two fitted layers before, each of two tensor files: the second file of the stage's
    # second checkpoint
    assert killed(run, "tensors of a checkpoint", 4 + (stage - 2) * 6 + 4) == -signal.SIGKILL
    folder = next(run.glob(f"{stage}-*"))
    assert [p.name for p in sorted(folder.glob("checkpoint-*"))] == ["checkpoint-000002"]
    assert list(folder.glob(".partial-*"))
    run_tiny(run)
    assert_equal(run, reference)


def test_a_fitted_layer_is_not_fitted_again(tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, lines = tmp_path / "run", []
    assert killed(run, "fitted layer", 2) == -signal.SIGKILL
    assert [p.name for p in (run / "1-calibrate").glob("layer-*")] == ["layer-1"]
    fits: list[int] = []
    original = calibrate._Layer._fit

    def counted(self: Any, *args: Any) -> Any:
        fits.append(self.index)
        return original(self, *args)

    monkeypatch.setattr(calibrate._Layer, "_fit", counted)
    run_tiny(run, say=lines.append)
    assert fits == [3]
    assert "calibrate: 1 of 2 layers are fitted already" in lines
    assert_equal(run, reference)


def test_killed_again_and_again(tmp_path: Path, reference: Path) -> None:
    run = tmp_path / "run"
    kills = [("any rename", 4), ("calibration", 1), ("training step", 4), ("tensors of a checkpoint", 1),
             ("metrics line", 7), ("hash for a manifest", 3), ("training step", 3)]  # fmt: skip
    codes = [killed(run, place, nth) for place, nth in kills]
    assert codes == [-signal.SIGKILL] * len(kills)
    run_tiny(run)
    assert_equal(run, reference)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("place", "nth"), [("training step", 8), ("artifact", 2)])
def test_a_stopped_run_says_so_and_resumes(tmp_path: Path, reference: Path, signum: int, place: str, nth: int) -> None:
    run = tmp_path / "run"
    assert killed(run, place, nth, signum) == 128 + signum
    if place == "training step":
        # the step that was under way is finished and saved: five of mixing, three of hidden
        assert [p.name for p in (run / "3-hidden").glob("checkpoint-*")] == ["checkpoint-000003"]
    assert not (run / "final").exists()
    run_tiny(run)
    assert_equal(run, reference)


def test_a_signal_during_the_evaluation_stops_before_final(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    run_tiny(run, until="logits")

    def measured(*_args: Any, say: Callable[[str], None], **_options: Any) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        say("evaluate: one set of two")
        raise AssertionError("the evaluation went on")

    monkeypatch.setattr(pipeline, "evaluate", measured)
    assert in_child(lambda: run_tiny(run, "evaluate.suite=short")) == 128 + signal.SIGTERM
    assert not (run / "final").exists()


def test_a_kill_in_the_evaluation_keeps_the_artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    run_tiny(run, until="logits")
    before = (run / "4-logits" / "student" / "student.safetensors").read_bytes()

    def measured(*_args: Any, **_options: Any) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")

    monkeypatch.setattr(pipeline, "evaluate", measured)
    assert in_child(lambda: run_tiny(run, "evaluate.suite=short")) == -signal.SIGKILL
    assert not (run / "report.json").exists()
    monkeypatch.undo()
    run_tiny(run)
    assert (run / "4-logits" / "student" / "student.safetensors").read_bytes() == before
    assert (run / "final" / "model.safetensors").is_file()


def test_a_resume_may_itself_stop_at_a_stage(tmp_path: Path, reference: Path) -> None:
    run = tmp_path / "run"
    assert killed(run, "training step", 3) == -signal.SIGKILL
    run_tiny(run, until="hidden")
    assert not (run / "4-logits").exists()
    assert not (run / "final").exists()
    assert killed(run, "training step", 5) == -signal.SIGKILL
    run_tiny(run)
    assert_equal(run, reference)


def test_a_kill_while_stages_are_forgotten_leaves_a_run_that_resumes(tmp_path: Path, reference: Path) -> None:
    run = tmp_path / "run"
    run_tiny(run)

    def work() -> None:
        calls = [0]
        original = pipeline.remove_folder

        def killing(path: Path) -> None:
            calls[0] += 1
            if calls[0] == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            original(path)

        pipeline.remove_folder = killing
        run_tiny(run, start="2-mixing")

    assert in_child(work) == -signal.SIGKILL
    assert not (run / "final").exists()
    assert [p.name for p in sorted(run.glob("[0-9]*"))] == ["0-surgery", "1-calibrate", "2-mixing", "3-hidden"]
    run_tiny(run)
    assert_equal(run, reference)
