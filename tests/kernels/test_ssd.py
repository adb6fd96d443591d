"""The scan on a CPU: every backend against the recurrence, forward, every gradient and the final state."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from ssmorph.kernels.ssd import BACKENDS, ssd

from .conftest import on_cpu

# every length with every batch and every share of heads in a group
TABLE = [
    {"length": length, "batch": batch, "heads": heads, "groups": groups}
    for length in (1, 3, 63, 500)
    for batch in (1, 3)
    for heads, groups in ((1, 1), (9, 9), (9, 3), (9, 1))
]
CASES: list[dict[str, Any]] = [
    *TABLE,
    {"length": 64},
    {"length": 65, "heads": 3},
    {"length": 90, "width": 5, "state": 7},
    {"length": 70, "width": 80, "state": 96},
    {"length": 70, "width": 96, "state": 80},
    {"length": 66, "heads": 2, "groups": 1, "width": 256, "state": 256},
    {"length": 130, "heads": 1, "width": 256, "state": 16},
    {"length": 130, "heads": 1, "width": 16, "state": 256},
    {"length": 70, "absent": ("w_BLH",)},
    {"length": 70, "absent": ("D_H",)},
    {"length": 70, "absent": ("initial_state_BHPN",)},
    {"length": 500, "absent": ("w_BLH", "D_H", "initial_state_BHPN")},
]
# of one token; a sudden one stands between tokens that forget nothing
DECAYS = {"none": 0.0, "total": -50.0, "sudden": (0.0, 0.0, 0.0, -50.0), "by-turns": (-50.0, -1e-3)}
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}


def inputs(
    batch: int = 1,
    length: int = 16,
    heads: int = 2,
    groups: int | None = None,
    width: int = 4,
    state: int = 3,
    decay: float = 0.3,
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    groups = groups or heads
    return {
        "x_BLHP": draw(batch, length, heads, width),
        "log_a_BLH": -decay * draw(batch, length, heads).abs(),
        "B_BLGN": draw(batch, length, groups, state),
        "C_BLGN": draw(batch, length, groups, state),
        "w_BLH": draw(batch, length, heads).abs(),
        "D_H": draw(heads),
        "initial_state_BHPN": draw(batch, heads, width, state),
    }


def outputs_and_gradients(tensors: dict[str, Tensor], backend: str, **options: Tensor) -> list[Tensor]:
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    y, state = ssd(**leaves, **options, backend=backend)
    g = torch.Generator().manual_seed(1)
    # drawn in double, since other dtypes draw other numbers
    on_y, on_state = (torch.randn(t.shape, generator=g, dtype=torch.float64).to(t) for t in (y, state))
    loss = (y * on_y).sum() + (state * on_state).sum()
    loss.backward()
    return [y.detach(), state.detach(), *(t.grad for t in leaves.values())]


def assert_same(a: list[Tensor], b: list[Tensor], tolerance: float = 1e-10) -> None:
    for own, expected in zip(a, b, strict=True):
        assert torch.isfinite(own).all()
        assert (own - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(1)


def case_inputs(case: dict[str, Any]) -> dict[str, Tensor]:
    tensors = inputs(**{name: value for name, value in case.items() if name not in ("absent", "log_a")})
    if "log_a" in case:
        shape = tensors["log_a_BLH"].shape
        turns = torch.tensor(case["log_a"], dtype=torch.float64).reshape(-1).repeat(shape[1])[: shape[1]]
        tensors["log_a_BLH"] = turns[None, :, None].repeat(shape[0], 1, shape[2])
    return {name: t for name, t in tensors.items() if name not in case.get("absent", ())}


@functools.cache
def _expected(case: tuple[tuple[str, Any], ...]) -> list[Tensor]:
    return outputs_and_gradients(case_inputs(dict(case)), "reference")


def assert_equals_recurrence(case: dict[str, Any], backend: str, dtype: torch.dtype, tolerance: float) -> None:
    tensors = {name: t.to(dtype) for name, t in case_inputs(case).items()}
    own = outputs_and_gradients(tensors, backend)
    assert all(t.dtype == dtype for t in own)
    assert_same([t.double() for t in own], _expected(tuple(case.items())), tolerance)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["double", "single"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_equals_recurrence(case: dict[str, Any], dtype: torch.dtype, scan_backend: str, poisoned: None) -> None:
    assert_equals_recurrence(case, scan_backend, dtype, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["double", "single"])
@pytest.mark.parametrize("decay", DECAYS)
def test_extreme_decay(decay: str, dtype: torch.dtype, scan_backend: str, poisoned: None) -> None:
    # in float32 a cumulative decay of -1600 in a chunk is known to 1e-4 only
    tolerance = 10 * TOLERANCES[dtype]
    assert_equals_recurrence({"length": 200, "heads": 2, "log_a": DECAYS[decay]}, scan_backend, dtype, tolerance)


def test_the_state_matters(scan_backend: str) -> None:
    t = inputs(length=20)
    with_state = ssd(**t, backend=scan_backend)[0]
    without = ssd(**{**t, "initial_state_BHPN": torch.zeros_like(t["initial_state_BHPN"])}, backend=scan_backend)[0]
    assert (with_state - without).abs().max() > 1e-2


def test_half_precision_keeps_a_float32_state(scan_backend: str) -> None:
    t = inputs(length=100)
    expected = ssd(**t, backend=scan_backend)[0]
    y, state = ssd(**{n: v.bfloat16() for n, v in t.items()}, backend=scan_backend)
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert (y.double() - expected).abs().max() / expected.abs().max() < 3e-2


def test_the_default_is_made_for_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSMORPH_BACKEND", raising=False)
    assert BACKENDS.choose(None, torch.device("cpu")) in on_cpu(BACKENDS)
