"""Choosing a backend: the argument, then the environment, then the first that does not refuse the device."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from ssmorph.kernels import mixing, relation, ssd
from ssmorph.kernels.common.dispatch import ENVIRONMENT, Backends

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)


def table() -> Backends:
    return Backends(
        "root",
        {"gpu": "absent_package:root", "fast": "math:sqrt", "slow": "cmath:sqrt", "broken": "absent_package:root"},
        refuses={"gpu": lambda device: None if device.type == "cuda" else "it needs CUDA"},
    )


def test_takes_the_first_backend_that_runs_on_the_device() -> None:
    assert table().choose(None, CPU) == "fast"
    assert table().choose(None, torch.device("cuda")) == "gpu"
    assert table().load(None, CPU)(9.0) == 3.0


def test_the_argument_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "slow")
    assert table().choose(None, CPU) == "slow"
    assert table().choose("fast", CPU) == "fast"
    assert table().load(None, CPU)(-1.0) == 1j


def test_unknown_names_are_errors_that_name_their_source(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"root\.backend: .*'fats'.*'fast'"):
        table().choose("fats", CPU)
    monkeypatch.setenv(ENVIRONMENT, "fats")
    with pytest.raises(ValueError, match=f"{ENVIRONMENT}: .*'fats'"):
        table().choose(None, CPU)


def test_a_request_that_cannot_run_is_an_error_and_never_replaced() -> None:
    with pytest.raises(ValueError, match="it needs CUDA"):
        table().choose("gpu", CPU)
    with pytest.raises(ValueError, match="absent_package"):
        table().load("broken", CPU)
    with pytest.raises(ValueError, match="needs a backend for cpu"):
        Backends("root", {"gpu": "absent:root"}, refuses={"gpu": lambda device: "it needs CUDA"}).choose(None, CPU)


def test_logs_each_choice_once(caplog: pytest.LogCaptureFixture) -> None:
    backends = table()
    with caplog.at_level(logging.INFO):
        for requested in (None, None, "slow", "fast"):
            backends.choose(requested, CPU)
    assert caplog.messages == [
        "root: backend fast on cpu, since it needs CUDA",
        "root: backend slow on cpu, as root.backend asks",
    ]


def test_a_gpu_prefers_its_own_backend_and_says_why_another_runs(caplog: pytest.LogCaptureFixture) -> None:
    def on_gpu(reason: str | None) -> Backends:
        targets = {"fast": "math:sqrt", "gpu": "math:sqrt"}
        return Backends("root", targets, refuses={"gpu": lambda device: reason}, on_gpu="gpu")

    assert on_gpu(None).choose(None, torch.device("cuda")) == "gpu"
    with caplog.at_level(logging.INFO):
        assert on_gpu(None).choose(None, CPU) == "fast"
    assert caplog.messages == ["root: backend fast on cpu, the best one here"]
    caplog.clear()
    assert on_gpu("not installed").choose(None, torch.device("cuda")) == "fast"
    assert caplog.messages == ["root: backend fast on cuda, since not installed"]


def test_a_backend_that_cannot_do_this_call_is_passed_over_by_name(caplog: pytest.LogCaptureFixture) -> None:
    def fresh() -> Backends:
        return Backends("root", {"fast": "math:sqrt", "gpu": "math:sqrt"}, on_gpu="gpu")

    gpu = torch.device("cuda")
    assert fresh().choose(None, gpu, {"gpu": None}) == "gpu"
    assert fresh().choose("gpu", gpu, {"gpu": "too wide"}) == "gpu", "it was asked for, and says itself what is wrong"
    with caplog.at_level(logging.INFO):
        assert fresh().choose(None, gpu, {"gpu": "too wide"}) == "fast"
    assert caplog.messages == ["root: backend fast on cuda, since too wide"]


@pytest.mark.parametrize(("width", "named"), [(128, None), (129, "not 129"), (256, "not 256")])
def test_widths_that_no_launch_holds_are_named_beforehand(
    width: int, named: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window's scan of heads of 128 channels is 129 wide, and its caller cannot name a backend."""
    reasons: list[str | None] = []

    def load(_backend: str | None, _device: torch.device, unfit: dict[str, str | None]) -> Any:
        reasons.append(unfit["triton"])
        raise InterruptedError

    monkeypatch.setattr(ssd.BACKENDS, "load", load)
    monkeypatch.setattr(mixing.BACKENDS, "load", load)
    monkeypatch.setattr(relation.BACKENDS, "load", load)
    x, one = torch.zeros(1, 2, 1, width), torch.zeros(1, 2, 1)
    with pytest.raises(InterruptedError):
        ssd.ssd(x, one, x, x)
    with pytest.raises(InterruptedError):
        mixing.mixing_loss(x, x, one, x, x, scale=1.0)
    with pytest.raises(InterruptedError):
        relation.relation_loss(x[:, :, 0], x[:, :, 0], heads=1)
    for reason in reasons:
        assert reason is None if named is None else named in str(reason)
    assert len(reasons) == 3
