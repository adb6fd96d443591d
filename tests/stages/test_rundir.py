"""The run directory under kills, full disks, second processes and torn lines."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ssmorph.errors import UserError
from ssmorph.stages import rundir
from ssmorph.stages.rundir import RunDir, atomic_folder, atomic_write, content_hash, remove_folder

# Replaces a folder of eight files over and over; every file of one generation holds the same number.
WRITER = """
import itertools, sys
from pathlib import Path
from ssmorph.stages.rundir import RunDir, atomic_folder
run = RunDir(sys.argv[1])
for generation in itertools.count():
    with atomic_folder(run.path / "artifact") as folder:
        for name in "abcdefgh":
            (folder / name).write_text(str(generation))
    print(generation, flush=True)
"""
HOLDER = """
import sys
from ssmorph.stages.rundir import RunDir
run = RunDir(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def start(code: str, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def raising(code: int) -> Any:
    def fake(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return fake


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_writer_leaves_whole_folders_or_none(tmp_path: Path, seed: int) -> None:
    run = tmp_path / "run"
    process = start(WRITER, run)
    assert process.stdout is not None
    chooser = random.Random(seed)
    for _ in range(chooser.randint(2, 12)):
        process.stdout.readline()
    # a delay spreads the kills over the writing of one generation; any moment must do
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=chooser.uniform(0, 0.01))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    with RunDir(run):
        assert [name for name in names(run) if name.startswith(rundir.PARTIAL)] == []
        if (run / "artifact").exists():
            assert names(run / "artifact") == list("abcdefgh")
            assert len({file.read_text() for file in (run / "artifact").iterdir()}) == 1


@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_a_replacement_cut_short_shows_the_old_the_new_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    folder = tmp_path / "run" / "final"
    with RunDir(tmp_path / "run"), atomic_folder(folder) as partial:
        (partial / "a").write_text("old")
    calls, replace = [], os.replace

    def dying(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == {"before": 1, "between": 2, "after": 3}[moment]:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", dying)
    try:
        with atomic_folder(folder) as partial:
            (partial / "a").write_text("new")
    except KeyboardInterrupt:
        assert moment != "after"
    monkeypatch.undo()
    with RunDir(tmp_path / "run"):
        expected = {"before": ["old"], "between": [], "after": ["new"]}[moment]
        assert [file.read_text() for file in folder.glob("*")] == expected


def test_a_failing_body_leaves_the_old_folder(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "a") as partial:
        (partial / "x").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "a") as partial:  # noqa: PT012
        (partial / "x").write_text("new")
        raise RuntimeError
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a" / "x").read_text() == "old"


def test_the_second_rename_failing_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("old")
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if not source.name.startswith(f"{rundir.PARTIAL}old") and target == tmp_path / "a":
            raise OSError(errno.ENOSPC, "full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="nothing saved was lost"), atomic_folder(tmp_path / "a"):
        pass
    assert (tmp_path / "a" / "x").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_remove_folder_removes_all_of_it(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    remove_folder(tmp_path / "a")
    assert names(tmp_path) == []


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_a_disk_that_takes_no_more_is_named_and_old_content_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, code: int
) -> None:
    atomic_write(tmp_path / "a.json", "old")
    monkeypatch.setattr(os, function, raising(code))
    with pytest.raises(UserError, match=r"a\.json: .*nothing saved was lost"):
        atomic_write(tmp_path / "a.json", "new")
    with pytest.raises(UserError, match="nothing saved was lost"), atomic_folder(tmp_path / "folder") as partial:
        (partial / "x").write_text("x")
    assert (tmp_path / "a.json").read_text() == "old"
    assert names(tmp_path) == ["a.json"]


def test_a_metrics_file_that_cannot_be_opened_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunDir(tmp_path) as run:
        monkeypatch.setattr(Path, "open", raising(errno.ENOSPC))
        with pytest.raises(UserError, match=r"metrics\.jsonl: .*nothing saved was lost"):
            run.log_metrics({"stage": "1-a", "step": 1})


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="run_dir: must be a folder"):
            RunDir(bad)
    monkeypatch.setattr(Path, "mkdir", raising(errno.EACCES))
    with pytest.raises(UserError, match="must be writable"):
        RunDir(tmp_path / "run")


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "a"):
        (tmp_path / "missing").read_text()


def test_a_second_process_is_refused_by_pid_until_the_first_dies(tmp_path: Path) -> None:
    process = start(HOLDER, tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"held by process {process.pid}\."):
        RunDir(tmp_path)
    process.kill()
    process.communicate()
    with RunDir(tmp_path) as run:
        with pytest.raises(UserError, match=rf"held by process {os.getpid()}\."):
            RunDir(tmp_path)
        assert run.path == tmp_path
    RunDir(tmp_path).close()


def test_opening_sweeps_what_a_killed_process_left(tmp_path: Path) -> None:
    for left in (tmp_path / ".partial-final-9", tmp_path / "0-surgery" / ".partial-student-9"):
        left.mkdir(parents=True)
        (left / "x").write_text("x")
    (tmp_path / ".partial-plan.json-9").write_text("x")
    (tmp_path / "plan.json").write_text("{}")
    RunDir(tmp_path).close()
    assert names(tmp_path) == [".lock", "0-surgery", "plan.json"]
    assert names(tmp_path / "0-surgery") == []


def test_content_hash_sees_names_bytes_and_folders(tmp_path: Path) -> None:
    hashes = []
    for files in ({"a": "x"}, {"b": "x"}, {"a": "y"}, {"s/a": "x"}, {"a": "x", "b": ""}, {"a": "x"}):
        folder = tmp_path / str(len(hashes))
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content)
        hashes.append(content_hash(folder))
    assert hashes[0] == hashes[-1]
    assert len(set(hashes)) == len(hashes) - 1


def test_done_records_both_artifacts_and_notices_a_change(tmp_path: Path) -> None:
    with RunDir(tmp_path) as run:
        assert (run.done("0-surgery"), run.started("0-surgery")) == (None, False)
        student = run.stage_dir("0-surgery") / "student"
        assert not run.started("0-surgery")
        with atomic_folder(student) as partial:
            (partial / "weights").write_bytes(b"123")
        assert run.started("0-surgery")
        artifact = run.mark_done("0-surgery", "", {"loss": 0.1})
        assert artifact == content_hash(student)
        run.stage_dir("1-hidden")
        with atomic_folder(tmp_path / "1-hidden" / "student") as partial:
            (partial / "weights").write_bytes(b"456")
        run.mark_done("1-hidden", artifact, {})
        assert run.done("0-surgery") == {"artifact": artifact, "source": "", "summary": {"loss": 0.1}}
        assert (run.done("1-hidden") or {})["source"] == artifact
        (student / "weights").write_bytes(b"124")
        with pytest.raises(UserError, match="must be what the stage wrote"):
            run.done("0-surgery")


def test_json_files_round_trip_and_may_be_absent(tmp_path: Path) -> None:
    with RunDir(tmp_path) as run:
        assert run.read_json("plan.json") is None
        run.write_json("plan.json", {"layers": [1, 2], "x": 0.1 + 0.2})
        assert run.read_json("plan.json") == {"layers": [1, 2], "x": 0.1 + 0.2}


def steps(run: RunDir) -> list[tuple[str, int]]:
    records = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return [(r["stage"], r["step"]) for r in records]


def test_resuming_drops_the_stages_later_lines_only(tmp_path: Path) -> None:
    with RunDir(tmp_path) as run:
        run.truncate_metrics("1-a", 0)
        for stage, step in [("1-a", 1), ("1-a", 2), ("2-b", 1), ("2-b", 2), ("2-b", 3)]:
            run.log_metrics({"stage": stage, "step": step, "loss": 0.5})
        run.truncate_metrics("2-b", 1)
        assert steps(run) == [("1-a", 1), ("1-a", 2), ("2-b", 1)]
        run.log_metrics({"stage": "2-b", "step": 2})
        assert steps(run)[-1] == ("2-b", 2)


@pytest.mark.parametrize("torn", [b"{", b'{"stage": "1-a", "st', b"\x00\x00\x00", b"\xc3"])
def test_a_torn_last_line_does_not_swallow_the_next(tmp_path: Path, torn: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"stage": "1-a", "step": 1}\n' + torn)
    with RunDir(tmp_path) as run:
        run.log_metrics({"stage": "1-a", "step": 2})
        run.truncate_metrics("1-a", 5)
        assert steps(run) == [("1-a", 1), ("1-a", 2)]


def test_a_broken_line_in_the_middle_is_named_not_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"stage": "1-a", "step": 1}\nnonsense\n{"note": 1}\n')
    with RunDir(tmp_path) as run, pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        run.truncate_metrics("1-a", 1)
