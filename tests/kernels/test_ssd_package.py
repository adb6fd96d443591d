"""The package mamba-ssm as a backend: what it is given and refused, how it is probed, equality where it exists."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ssmorph.kernels.ssd import BACKENDS, STEPS, package, ssd, ssd_step

from . import mamba_stand_in
from .conftest import DEVICE
from .test_ssd import assert_same, inputs, outputs_and_gradients
from .test_ssd_parts import SEQUENCE

GPU = torch.device("cuda")
OPTIONS = ("w_BLH", "D_H", "initial_state_BHPN")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's two modules, and a backend that takes them for the package's on any device."""
    for name in (package.SCAN, package.STEP):
        monkeypatch.setitem(sys.modules, name, mamba_stand_in)
    for table in (BACKENDS, STEPS):
        monkeypatch.setitem(table._refuses, "mamba_ssm", lambda device: None)


@pytest.fixture
def fresh() -> Iterator[None]:
    """Asks again what was asked before."""
    package._broken.cache_clear()
    yield
    package._broken.cache_clear()


def single(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.float().to(DEVICE) for name, t in tensors.items()}


def without_dt(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tokens that do not decay, but write, and others that decay and do not write."""
    tensors["log_a_BLH"][:, ::3] = 0
    if "w_BLH" in tensors:
        tensors["w_BLH"][:, 1::4] = 0
    return tensors


@pytest.mark.parametrize("absent", [(), OPTIONS, *((name,) for name in OPTIONS)], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("length", [1, 37, 64])
def test_scan(
    length: int, packed: bool, absent: tuple[str, ...], stand_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package, "CHUNK", 16)
    tensors = {n: t for n, t in inputs(batch=2, length=length, heads=4, groups=2).items() if n not in absent}
    tensors = single(without_dt(tensors))
    documents = torch.arange(3, 3 + length, device=DEVICE).div(9, rounding_mode="floor").expand(2, -1)
    options = {"segment_BL": documents} if packed else {}
    expected = outputs_and_gradients(tensors, "reference", **options)
    assert_same(outputs_and_gradients(tensors, "mamba_ssm", **options), expected, 1e-5)


def test_scan_of_half_types_and_views(stand_in: None) -> None:
    tensors = {n: t.to(torch.bfloat16) for n, t in single(inputs(length=20, heads=4, groups=2)).items()}
    expected = outputs_and_gradients(tensors, "reference")
    assert [t.dtype for t in outputs_and_gradients(tensors, "mamba_ssm")] == [t.dtype for t in expected]
    turned = {n: tensors[n].transpose(-1, -2).contiguous().transpose(-1, -2) for n in ("x_BLHP", "B_BLGN", "C_BLGN")}
    assert torch.equal(ssd(**tensors | turned, backend="mamba_ssm")[0], ssd(**tensors, backend="mamba_ssm")[0])


@pytest.mark.parametrize("absent", [(), ("w_BH",), ("D_H",)], ids=str)
def test_step(absent: tuple[str, ...], stand_in: None) -> None:
    tensors = single(inputs(batch=3, length=1, heads=4, groups=2))
    given = {"w_BH": tensors["w_BLH"][:, 0], "D_H": tensors["D_H"]}
    given = {n: t for n, t in given.items() if n not in absent}
    token = [tensors[n][:, 0] for n in SEQUENCE[:4]]
    state, other = (tensors["initial_state_BHPN"].clone() for _ in range(2))
    y = ssd_step(state, *token, **given, backend="mamba_ssm")
    assert_same([y, state], [ssd_step(other, *token, **given, backend="reference"), other], 1e-6)


def test_what_it_cannot_do_is_refused(stand_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    t = inputs(batch=2, length=1, heads=4)
    with pytest.raises(ValueError, match=r"ssd\.backend: 'mamba_ssm' computes in float32; got torch\.float64"):
        ssd(**t, backend="mamba_ssm")
    token = [t[n][:, 0] for n in SEQUENCE[:4]]
    with pytest.raises(ValueError, match=r"ssd_step\.backend: 'mamba_ssm' computes in float32; got torch\.float64"):
        ssd_step(t["initial_state_BHPN"], *token, backend="mamba_ssm")
    token, state = [v.float() for v in token], t["initial_state_BHPN"].float()
    with pytest.raises(ValueError, match=r"ssd_step\.state_BHPN: 'mamba_ssm' needs a contiguous state; got"):
        ssd_step(state.transpose(0, 1).contiguous().transpose(0, 1), *token, backend="mamba_ssm")
    monkeypatch.setattr(package, "MOST", 7)
    with pytest.raises(ValueError, match=r"ssd_step\.backend: 'mamba_ssm' takes 7 rows x heads; got 8"):
        ssd_step(state, *token, backend="mamba_ssm")


@pytest.mark.parametrize("refuses", [package.refuses_scan, package.refuses_step])
def test_it_is_probed_by_its_functions(refuses: Any, fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert refuses(torch.device("cpu")) == "mamba_ssm needs a GPU"
    assert refuses(GPU) == "the package mamba-ssm is not installed"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    module = types.ModuleType("stand_in")
    for name in (package.SCAN, package.STEP):
        monkeypatch.setitem(sys.modules, name, module)
    package._broken.cache_clear()
    assert "kernels are not to be had: AttributeError" in str(refuses(GPU))
    for name in (package.SCAN, package.STEP):
        monkeypatch.setitem(sys.modules, name, mamba_stand_in)
    package._broken.cache_clear()
    assert refuses(GPU) is None


def test_a_version_that_takes_its_decay_elsewhere_is_refused(
    stand_in: None, fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(mamba_stand_in, "_mamba_chunk_scan_combined_bwd", mamba_stand_in._mamba_chunk_scan_combined_fwd)
    assert "does not call _chunk_cumsum_bwd and _chunk_cumsum_fwd" in str(package.refuses_scan(GPU))
    assert package.refuses_step(GPU) is None


@pytest.mark.parametrize("table", [BACKENDS, STEPS], ids=lambda table: table.op_name)
def test_only_a_request_chooses_it(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSMORPH_BACKEND", raising=False)
    with pytest.raises(ValueError, match=r"backend 'mamba_ssm' must run on cpu; got mamba_ssm needs a GPU"):
        table.choose("mamba_ssm", torch.device("cpu"))
    monkeypatch.setattr(package, "_broken", lambda find: None)
    assert table.choose("mamba_ssm", GPU) == "mamba_ssm"
    assert table.choose(None, GPU) != "mamba_ssm"
    for name in ("triton", "chunked"):
        monkeypatch.setitem(table._refuses, name, lambda device: "not today")
    assert table.choose(None, GPU) != "mamba_ssm"


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_the_package_equals_the_recurrence(packed: bool) -> None:
    for table in (BACKENDS, STEPS):
        reason = table.refusal("mamba_ssm", DEVICE)
        if reason is not None:
            pytest.skip(reason)
    tensors = single(without_dt(inputs(length=600, heads=4, groups=2, width=64, state=64)))
    documents = torch.repeat_interleave(torch.arange(3, device=DEVICE), torch.tensor([100, 300, 200], device=DEVICE))
    options = {"segment_BL": documents[None]} if packed else {}
    expected = outputs_and_gradients({n: t.double() for n, t in tensors.items()}, "reference", **options)
    # its products of float32 are TF32 ones
    assert_same([t.double() for t in outputs_and_gradients(tensors, "mamba_ssm", **options)], expected, 5e-3)
    token = [tensors[n][:, 0] for n in SEQUENCE]
    state, other = (tensors["initial_state_BHPN"].clone() for _ in range(2))
    steps = [ssd_step(s, *token[:4], w_BH=token[4], backend=n) for s, n in ((state, "mamba_ssm"), (other, "reference"))]
    assert_same([steps[0], state], [steps[1], other], 1e-5)
