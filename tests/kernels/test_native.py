"""Compiled C on the CPU: how it is made and kept, what happens where it cannot be, other vector widths, threads."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ssmorph.kernels.common import native
from ssmorph.kernels.ssd import BACKENDS, ssd
from tests.kernels import test_mixing
from tests.kernels.test_ssd import inputs, outputs_and_gradients

CPU = torch.device("cpu")
FRESH = (native.loaded, native._compiler, native._broken)
pytestmark = pytest.mark.skipif(
    "native" in BACKENDS.refusals(CPU), reason=f"native code: {BACKENDS.refusals(CPU).get('native')}"
)


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """As on a machine that has never compiled anything; the folder where libraries will be."""
    monkeypatch.setenv("SSMORPH_CACHE", str(tmp_path / "cache"))
    for cached in FRESH:
        cached.cache_clear()
    yield tmp_path / "cache" / "native"
    monkeypatch.undo()
    for cached in FRESH:
        cached.cache_clear()


def compiler(folder: Path, body: str) -> str:
    """A compiler that answers what it is asked about itself, and then does what `body` says."""
    script = folder / "cc"
    script.write_text(f'#!/bin/sh\ncase "$*" in *-dM*) exit 0;; esac\n{body}\n')
    script.chmod(0o755)
    return str(script)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*")) if folder.exists() else []


def test_is_compiled_once_and_kept(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.refuses_native(CPU) is None
    made = files(fresh)
    assert [name.partition("-")[0] for name in made] == ["mixing", "ssd", "window_step"]
    for cached in FRESH:
        cached.cache_clear()
    monkeypatch.setattr(native, "_compile", lambda *_: pytest.fail("compiled again"))
    assert native.refuses_native(CPU) is None
    assert files(fresh) == made


def test_without_a_compiler_another_backend_runs_and_says_why(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(BACKENDS, "_logged", set())
    tensors = inputs(length=5)
    with caplog.at_level(logging.INFO):
        ssd(**tensors)
    (message,) = caplog.messages
    assert message.startswith("ssd: backend chunked on cpu, since kernels.native: a C compiler must be on the PATH")
    with pytest.raises(ValueError, match=r"backend 'native' must run on cpu; got .*C compiler.* Leave it out"):
        ssd(**tensors, backend="native")
    assert files(fresh) == []


@pytest.mark.parametrize("body", ["echo bad flag >&2; exit 1", "for last; do :; done; echo half; exit 1"])
def test_a_compiler_that_fails_leaves_nothing_behind(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    monkeypatch.setenv("CC", compiler(tmp_path, body))
    reason = native.refuses_native(CPU)
    assert reason is not None
    assert "must compile native.c; got " in reason
    assert files(fresh) == []


def test_half_a_library_is_never_seen(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed compiler has written stands under another name than the one looked for."""
    write_then_die = 'while [ "$1" != -o ]; do shift; done; echo half > "$2"; ls "$(dirname "$2")/.." >&2; exit 1'
    monkeypatch.setenv("CC", compiler(tmp_path, write_then_die))
    reason = native.refuses_native(CPU)
    assert reason is not None
    assert ".so" not in reason


def test_other_devices_are_refused() -> None:
    assert native.refuses_native(torch.device("cuda")) == "native code runs on the CPU"


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names instruction sets of x86")
@pytest.mark.parametrize("instructions", ["x86-64", "x86-64-v3"])
def test_other_vector_widths(fresh: Path, monkeypatch: pytest.MonkeyPatch, instructions: str) -> None:
    monkeypatch.setattr(native, "TUNING", ((f"-march={instructions}",),))
    tensors = {n: t.float() for n, t in inputs(length=150, heads=4, groups=2, width=20, state=37).items()}
    exact = outputs_and_gradients({n: t.double() for n, t in tensors.items()}, "reference")
    for own, expected in zip(outputs_and_gradients(tensors, "native"), exact, strict=True):
        assert (own - expected).abs().max() < 2e-6 * expected.abs().max()
    made = test_mixing.problem(150, dtype=torch.float32)
    exact = test_mixing.run({n: t.double() for n, t in made.items()}, "reference", window=90, softcap=3.0)
    for own, expected in zip(test_mixing.run(made, "native", window=90, softcap=3.0), exact, strict=True):
        assert (own - expected).abs().max() < 2e-6 * expected.abs().max()
    assert len(files(fresh)) == 3


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def everything() -> list[Tensor]:
    scan = outputs_and_gradients(inputs(batch=3, length=100, heads=6, groups=3), "native")
    return scan + test_mixing.run(test_mixing.problem(150), "native")


def test_threads_do_not_change_a_bit(two_threads: None) -> None:
    together = everything()
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(together, everything(), strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_runs_after_a_fork(two_threads: None) -> None:
    """As in a data loader's worker: threads of the parent do not exist in the child."""
    tensors = inputs(length=30)
    expected = ssd(**tensors, backend="native")[0]
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(ssd(**tensors, backend="native")[0], expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
