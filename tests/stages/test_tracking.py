"""Trackers, without an account and without a network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ssmorph.errors import UserError
from ssmorph.stages.tracking import make_tracker


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A stand-in for wandb that records its calls, and a home without keys."""
    seen: dict[str, Any] = {"logged": []}

    def init(**kwargs: Any) -> SimpleNamespace:
        seen.update(kwargs)
        return SimpleNamespace(log=seen["logged"].append, finish=lambda: seen.update(finished=True))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return seen


def test_the_module_loads_no_tracker() -> None:
    code = "import sys, ssmorph.stages.tracking; print(sorted({'wandb', 'tensorboard', 'torch'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_none_writes_nothing(tmp_path: Path) -> None:
    tracker = make_tracker("none", tmp_path, {})
    tracker.log(1, {"loss": 1.0})
    tracker.finish()
    assert list(tmp_path.iterdir()) == []


def test_wandb_is_offline_without_a_key_and_named_after_the_run(tmp_path: Path, wandb: dict[str, Any]) -> None:
    (tmp_path / "my run.1").mkdir()
    tracker = make_tracker("wandb", tmp_path / "my run.1", {"seed": 1})
    tracker.log(3, {"1-hidden/loss": 0.5})
    tracker.finish()
    assert (wandb["name"], wandb["mode"], wandb["resume"]) == ("my run.1", "offline", "allow")
    assert wandb["config"] == {"seed": 1}
    assert wandb["logged"] == [{"1-hidden/loss": 0.5, "stage_step": 3}]
    assert wandb["finished"]
    assert "WANDB_MODE" not in os.environ


def test_a_moved_run_goes_on_with_its_curve_and_another_of_its_name_does_not(
    tmp_path: Path, wandb: dict[str, Any]
) -> None:
    ids = []
    for run in ("here/run", "there/run"):
        (tmp_path / run).mkdir(parents=True)
        make_tracker("wandb", tmp_path / run, {})
        ids.append(wandb["id"])
    (tmp_path / "here/run").rename(tmp_path / "moved")
    make_tracker("wandb", tmp_path / "moved", {})
    assert wandb["id"] == ids[0] != ids[1]


def test_the_current_folder_as_run_has_a_name(
    tmp_path: Path, wandb: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_tracker("wandb", Path(), {})
    assert wandb["name"] == tmp_path.name


@pytest.mark.parametrize(
    ("environment", "netrc", "mode"),
    [
        ({"WANDB_API_KEY": "k"}, "", "online"),
        ({}, "machine api.wandb.ai login user password k\n", "online"),
        ({}, "machine example.org login user password k\n", "offline"),
        ({"WANDB_BASE_URL": "https://example.org"}, "machine example.org login user password k\n", "online"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "", "offline"),
    ],
)
def test_wandb_is_online_where_a_key_for_its_host_is_found(
    tmp_path: Path,
    wandb: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    netrc: str,
    mode: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "netrc").write_text(netrc)
    (tmp_path / "netrc").chmod(0o600)
    make_tracker("wandb", tmp_path, {})
    assert wandb["mode"] == mode


def test_a_netrc_that_cannot_be_read_is_not_taken_for_none(tmp_path: Path, wandb: dict[str, Any]) -> None:
    (tmp_path / "netrc").write_text("nonsense here\n")
    with pytest.raises(UserError, match="netrc must be readable"):
        make_tracker("wandb", tmp_path, {})


@pytest.mark.parametrize(
    ("name", "module", "command"),
    [("wandb", "wandb", "pip install wandb"), ("tensorboard", "tensorboard", "pip install")],
)
def test_a_missing_tracker_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str, command: str
) -> None:
    for loaded in [m for m in sys.modules if m.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=command):
        make_tracker(name, tmp_path, {})


def test_tensorboard_writes_one_event_file(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    tracker = make_tracker("tensorboard", tmp_path, {})
    tracker.log(1, {"1-hidden/loss": 0.5})
    tracker.finish()
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"1-hidden/loss" in file.read_bytes()
