"""The package causal-conv1d as a backend: what it is given and refused, how it is probed, equality where it exists."""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssmorph.kernels.conv import BACKENDS, STEPS, causal_conv, causal_conv_step, package

from .conftest import DEVICE
from .test_conv import assert_close, draw, inputs, with_gradients


def _stand_in() -> types.ModuleType:
    """A package of that name with the signatures and layouts of causal-conv1d."""
    module = types.ModuleType("causal_conv1d")

    def fn(
        x: Tensor, weight: Tensor, bias: Tensor | None, *, seq_idx: Any, initial_states: Any, activation: Any
    ) -> Tensor:
        assert x.stride(1) == 1
        assert all(x.stride(d) % 8 == 0 for d in (0, 2))
        assert weight.is_contiguous()
        assert initial_states is None or initial_states.stride(1) == 1
        past = None if initial_states is None else initial_states.transpose(1, 2)
        options = {"silu": activation == "silu", "past_BKC": past, "segment_BL": seq_idx, "backend": "reference"}
        return causal_conv(x.transpose(1, 2), weight, bias, **options).transpose(1, 2)

    def update(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
        return causal_conv_step(state.transpose(1, 2), x, weight, bias, silu=activation == "silu", backend="reference")

    module.causal_conv1d_fn, module.causal_conv1d_update = fn, update  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize("option", ["past", "packed", "bias"])
def test_package_gets_its_layouts(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "causal_conv1d", _stand_in())
    tensors, options = inputs(length=9, batch=2, channels=16, **{option: option != "bias"})
    tensors["x_BLC"] = F.pad(tensors["x_BLC"], (0, 3))[..., :16]
    single = {name: t.float() for name, t in tensors.items()}
    arguments = (single.get(name) for name in ("x_BLC", "weight_CK", "bias_C"))
    y = package.conv_package(*arguments, options["silu"], single.get("past_BKC"), options["segment_BL"])
    assert torch.equal(y, causal_conv(**single, **options, backend="reference"))
    past = draw(2, 3, 16, seed=4).float()
    expected = causal_conv_step(kept := past.clone(), single["x_BLC"][:, 0], single["weight_CK"], backend="reference")
    assert torch.equal(package.step_package(past, single["x_BLC"][:, 0], single["weight_CK"], None, False), expected)
    assert torch.equal(past, kept)


def test_package_refuses_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "causal_conv1d", _stand_in())
    x, weight, past = torch.zeros(1, 4, 8), torch.zeros(8, 4), torch.zeros(1, 3, 8)
    with pytest.raises(ValueError, match="a past or packed documents, not both"):
        package.conv_package(x, weight, None, False, past, torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="multiple of 8 channels; got 7"):
        package.conv_package(x[..., :7], weight[:7], None, False, None, None)
    with pytest.raises(ValueError, match=r"computes in float32; got torch\.float64"):
        package.conv_package(x.double(), weight.double(), None, False, None, None)
    with pytest.raises(ValueError, match=r"causal_conv_step\.past_BKC.*bfloat16"):
        package.step_package(past.bfloat16(), x[:, 0], weight, None, False)


def test_package_is_probed_by_its_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    package._broken.cache_clear()
    assert package.refuses_package(DEVICE) == "the package causal-conv1d is not installed"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "causal_conv1d", types.ModuleType("causal_conv1d"))
    package._broken.cache_clear()
    assert "does not import: AttributeError" in str(package.refuses_package(DEVICE))
    monkeypatch.setitem(sys.modules, "causal_conv1d", _stand_in())
    package._broken.cache_clear()
    assert package.refuses_package(torch.device("cuda")) is None
    assert package.refuses_package(torch.device("cpu")) == "causal_conv1d needs a GPU"
    package._broken.cache_clear()


@pytest.mark.parametrize("table", [BACKENDS, STEPS], ids=lambda table: table.op_name)
def test_only_a_request_chooses_it(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "_broken", lambda: None)
    gpu = torch.device("cuda")
    assert table.choose("causal_conv1d", gpu) == "causal_conv1d"
    assert table.choose(None, gpu) != "causal_conv1d"
    with pytest.raises(ValueError, match="causal_conv1d needs a GPU"):
        table.choose("causal_conv1d", torch.device("cpu"))


def test_package_equals_triton(needs_triton: None) -> None:
    reason = package.refuses_package(DEVICE)
    if reason is not None:
        pytest.skip(reason)
    for case in ({"packed": True}, {"past": True}, {"width": 3, "silu": False}):
        tensors, options = inputs(length=200, batch=2, channels=64, **case)  # type: ignore[arg-type]
        single = {name: t.float() for name, t in tensors.items()}
        own = with_gradients(causal_conv, single, **options, backend="triton")
        assert_close(with_gradients(causal_conv, single, **options, backend="causal_conv1d"), own, 1e-5)
        past = draw(2, options.get("width", tensors["weight_CK"].shape[1]) - 1, 64, seed=4).float()
        steps = [
            causal_conv_step(past.clone(), single["x_BLC"][:, 0], single["weight_CK"], backend=name)
            for name in ("triton", "causal_conv1d")
        ]
        assert torch.allclose(*steps, atol=1e-5)
