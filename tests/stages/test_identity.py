"""A run's teacher stays the model it began with, its folder's other files stay, and the host program's torch too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssmorph import verbs
from ssmorph.convert import teachers
from ssmorph.convert.teachers import fingerprint
from ssmorph.convert.tiny import write_tiny
from ssmorph.errors import UserError

from .tiny_run import RECIPE, run_tiny


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A teacher on disk that a test may change."""
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    write_tiny(folder)
    return folder


def spoil(model: Path) -> None:
    """As if the model had been trained further under the same name."""
    tensors = load_file(model / "model.safetensors")
    save_file({name: t + 0.01 for name, t in tensors.items()}, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("until", ["calibrate", None])
def test_another_teacher_is_refused_and_changes_nothing(tmp_path: Path, model: Path, until: str | None) -> None:
    source, run = f"teacher.source={model}", tmp_path / "run"
    run_tiny(run, source, until=until)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name not in (".lock", "log.txt")}
    spoil(model)
    with pytest.raises(UserError, match="must be the model that the run began with"):
        run_tiny(run, source)
    if until is None:
        with pytest.raises(UserError, match="must be the model that the run began with"):
            verbs.evaluate_run(run, suite="short", tokens=96, say=lambda text: None)
    assert {p: p.read_bytes() for p in before} == before
    run_tiny(run, source, start="surgery", until="surgery")
    run_tiny(run, source, until="calibrate")


def test_a_relative_name_is_no_other_model_elsewhere(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_tiny(tmp_path / "run", "teacher.source=models/tiny", until="surgery")
    (tmp_path / "elsewhere" / "models" / "tiny").mkdir(parents=True)
    write_tiny(tmp_path / "elsewhere" / "models" / "tiny")
    spoil(tmp_path / "elsewhere" / "models" / "tiny")
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="another models/tiny"):
        run_tiny(tmp_path / "run", "teacher.source=models/tiny")


def test_a_byte_anywhere_tells_large_files_apart_that_differ_everywhere(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    content = bytes(range(256)) * (5 << 12)
    file.write_bytes(content)
    first = fingerprint(file)
    assert first == fingerprint(file)
    # one MB in the middle, as a tensor that was trained
    file.write_bytes(content[: 2 << 20] + bytes(1 << 20) + content[3 << 20 :])
    assert fingerprint(file) != first
    file.write_bytes(content + b"x")
    assert fingerprint(file) != first


def test_the_cache_of_a_gguf_file_knows_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSMORPH_CACHE", str(tmp_path / "cache"))
    wanted: list[Path] = []
    monkeypatch.setattr(teachers, "_cached", lambda target, write: wanted.append(target) or target)
    file = tmp_path / "model.gguf"
    for weights in (b"a", b"b", b"a"):
        file.write_bytes(b"head" * (1 << 18) + weights * (3 << 20))
        teachers.resolve(str(file))
    assert wanted[0] == wanted[2] != wanted[1]


def test_a_hybrid_is_no_teacher(tmp_path: Path) -> None:
    run = run_tiny(tmp_path / "run")
    with pytest.raises(UserError, match="a hybrid already"):
        verbs.convert(RECIPE, f"teacher.source={run / 'final'}", run_dir=str(tmp_path / "again"))


def test_from_forgets_stages_and_nothing_else(tmp_path: Path) -> None:
    run = tmp_path / "run"
    others = ["2024-thesis/thesis.txt", "3d-models/cube.stl", "report-2023.json", "1-hidden-notes/a.txt"]
    for name in others:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("mine")
    run_tiny(run, until="calibrate")
    run_tiny(run, start="surgery", until="surgery")
    assert not (run / "1-calibrate").exists()
    assert [(run / name).read_text() for name in others] == ["mine"] * len(others)


def test_torch_is_left_as_it_was(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    try:
        torch.manual_seed(5)
        expected = torch.rand(1)
        torch.manual_seed(5)
        verbs.convert(RECIPE, "threads=2", run_dir=str(tmp_path / "run"), until="calibrate", say=lambda text: None)
        assert json.loads((tmp_path / "run" / "env.json").read_text())["threads"] == 2
        assert torch.get_num_threads() == 1
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.equal(torch.rand(1), expected)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("device", ["cuda", "gpu"])
def test_a_device_that_is_not_here_is_named_at_once(tmp_path: Path, device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("cuda is here")
    with pytest.raises(UserError, match="device: must be one that torch has here"):
        run_tiny(tmp_path / "run", f"device={device}")
    assert not (tmp_path / "run").exists()


def test_damaged_files_of_a_run_are_named(tmp_path: Path) -> None:
    run = run_tiny(tmp_path / "run", "evaluate.suite=short", "evaluate.tokens=96")
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(whole + '{"stage": "4-lo')
    verbs.report(run)
    (run / "metrics.jsonl").write_text("{torn\n" + whole)
    with pytest.raises(UserError, match="line 1: must be a line of JSON"):
        verbs.report(run)
    (run / "env.json").unlink()
    with pytest.raises(UserError, match="must tell how the run computed"):
        verbs.evaluate_run(run, suite="short", say=lambda text: None)
    (run / "1-calibrate" / "DONE").write_text("{}")
    with pytest.raises(UserError, match="must be what a finished stage wrote"):
        verbs.status(run)
