"""The gated group norm: every backend against its definition, with gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssmorph.kernels.norm import chunked, gated_group_norm

from .conftest import DEVICE
from .test_conv import assert_close, draw, fenced, with_gradients

EPS = 1e-3
CASES: dict[str, dict[str, Any]] = {
    "one-channel": {"length": 1, "width": 1, "groups": 3},
    "odd": {"length": 33, "width": 5, "groups": 2, "batch": 2},
    "no-gate": {"length": 7, "width": 64, "groups": 3, "gate": False},
    "rows": {"length": 300, "width": 64, "groups": 1},
    "wide": {"length": 3, "width": 1000, "groups": 2},
    "widest": {"length": 19, "width": 1024, "groups": 1},
    "no-rows": {"length": 0, "width": 4, "groups": 2},
}


def inputs(length: int, width: int, groups: int, batch: int = 1, gate: bool = True) -> tuple[dict[str, Tensor], Any]:
    shape = (batch, length, width * groups)
    tensors = {"y_BLE": draw(*shape), "weight_E": draw(width * groups, seed=1)}
    if gate:
        tensors["gate_BLE"] = 3 * draw(*shape, seed=2)
    return tensors, {"groups": groups, "eps": EPS}


def norm(y_BLE: Tensor, weight_E: Tensor, gate_BLE: Tensor | None = None, **options: Any) -> Tensor:
    return gated_group_norm(y_BLE, gate_BLE, weight_E, **options)


def test_reference_is_per_group() -> None:
    y, gate, weight = draw(1, 2, 6), draw(1, 2, 6, seed=1), draw(6, seed=2)
    gated = y * F.silu(gate)
    for group in range(3):
        part = gated[..., 2 * group : 2 * group + 2]
        expected = weight[2 * group : 2 * group + 2] * part / (part.square().mean(-1, keepdim=True) + EPS).sqrt()
        own = norm(y, weight, gate, groups=3, eps=EPS, backend="reference")[..., 2 * group : 2 * group + 2]
        assert torch.allclose(own, expected)


@pytest.mark.parametrize("block", [chunked.NORM_BLOCK, 1], ids=["one-block", "row-by-row"])
@pytest.mark.parametrize("case", [c for c in CASES.values() if c["length"]], ids=[n for n in CASES if n != "no-rows"])
def test_chunked(case: dict[str, Any], block: int, monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    monkeypatch.setattr(chunked, "NORM_BLOCK", block)
    tensors, options = inputs(**case)
    expected = with_gradients(norm, tensors, **options, backend="reference")
    assert_close(with_gradients(norm, tensors, **options, backend="chunked"), expected, 1e-12)


@pytest.mark.parametrize("case", [c for c in CASES.values() if c["length"]], ids=[n for n in CASES if n != "no-rows"])
def test_triton(case: dict[str, Any], poisoned: None, needs_triton: None) -> None:
    tensors, options = inputs(**case)
    expected = with_gradients(norm, tensors, **options, backend="reference")
    single = {name: t.float() for name, t in tensors.items()}
    assert_close(with_gradients(norm, single, **options, backend="triton"), expected, 3e-6)


@pytest.mark.parametrize("backend", ["reference", "chunked", "triton"])
def test_no_rows(backend: str, needs_triton: None) -> None:
    tensors, options = inputs(**CASES["no-rows"])
    single = {name: t.float() for name, t in tensors.items()}
    found = with_gradients(norm, single, **options, backend=backend)
    assert found["y"].shape == (1, 0, 8)
    assert torch.equal(found["weight_E"], torch.zeros(8, device=DEVICE))


@pytest.mark.parametrize("backend", ["chunked", "triton"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=str)
def test_half_types_round_once(dtype: torch.dtype, tolerance: float, backend: str, needs_triton: None) -> None:
    tensors, options = inputs(length=40, width=24, groups=2)
    half = {name: t.to(dtype).requires_grad_() for name, t in tensors.items()}
    double = {name: t.detach().double().requires_grad_() for name, t in half.items()}
    dy = draw(1, 40, 48, seed=9).to(dtype)
    y, expected = norm(**half, **options, backend=backend), norm(**double, **options, backend="reference")
    y.backward(dy)
    expected.backward(dy.double())
    assert y.dtype == dtype
    own, other = ({"y": v.detach()} | {k: t.grad for k, t in d.items()} for v, d in ((y, half), (expected, double)))
    assert_close(own, other, tolerance)


@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_a_gate_and_a_weight_of_other_dtypes(backend: str, needs_triton: None) -> None:
    tensors, options = inputs(length=5, width=8, groups=2)
    dtypes = {"y_BLE": torch.bfloat16, "gate_BLE": torch.float16, "weight_E": torch.float32}
    tensors = {name: t.to(dtypes[name]) for name, t in tensors.items()}
    found = with_gradients(norm, tensors, **options, backend=backend)
    assert found["y"].dtype == torch.bfloat16
    assert {name: found[name].dtype for name in tensors} == dtypes


@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_reads_nothing_beside_its_inputs(backend: str, poisoned: None, needs_triton: None) -> None:
    tensors, options = inputs(length=37, width=12, groups=2, batch=2)
    expected = with_gradients(norm, tensors, **options, backend="reference")
    leaves = {name: t.float().requires_grad_() for name, t in tensors.items()}
    views = {name: fenced(t) if t.ndim > 1 else fenced(t[None])[0] for name, t in leaves.items()}
    y = norm(**views, **options, backend=backend)
    y.backward(fenced(draw(*y.shape, seed=9).float()))
    assert_close({"y": y.detach()} | {name: t.grad for name, t in leaves.items()}, expected, 3e-6)


@pytest.mark.parametrize("backend", ["chunked", "triton"])
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e15], ids=["zero", "tiny", "huge"])
def test_extreme_inputs(scale: float, backend: str, needs_triton: None) -> None:
    tensors, options = inputs(length=4, width=16, groups=2)
    tensors["y_BLE"] *= scale
    expected = with_gradients(norm, tensors, **options, backend="reference")
    single = {name: t.float() for name, t in tensors.items()}
    found = with_gradients(norm, single, **options, backend=backend)
    assert_close({"y": found["y"], "weight_E": found["weight_E"]}, {n: expected[n] for n in ("y", "weight_E")}, 3e-6)
    assert all(t.isfinite().all() for t in found.values())


@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_same_bits_again(backend: str, needs_triton: None) -> None:
    tensors, options = inputs(length=300, width=16, groups=1)
    single = {name: t.float() for name, t in tensors.items()}
    first, second = (with_gradients(norm, single, **options, backend=backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_chunked_against_finite_differences() -> None:
    tensors, options = inputs(length=3, width=3, groups=2)
    leaves = tuple(t.requires_grad_() for t in tensors.values())
    assert torch.autograd.gradcheck(lambda *t: norm(**dict(zip(tensors, t, strict=True)), **options), leaves)


def test_mistakes_are_named(needs_triton: None) -> None:
    y, weight = torch.zeros(1, 2, 6), torch.zeros(6)
    for groups in (4, 0):
        with pytest.raises(ValueError, match=r"gated_group_norm\.groups"):
            gated_group_norm(y, None, weight, groups=groups, eps=EPS)
    with pytest.raises(ValueError, match=r"gated_group_norm\.gate_BLE"):
        gated_group_norm(y, y[..., :3], weight, groups=2, eps=EPS)
    with pytest.raises(ValueError, match=r"gated_group_norm\.weight_E"):
        gated_group_norm(y, y, weight[:3], groups=2, eps=EPS)
    for wrong in (y[0], y.long()):
        with pytest.raises(ValueError, match=r"gated_group_norm\.y_BLE: must be floating point \[B, L, E\]"):
            gated_group_norm(wrong, None, weight, groups=2, eps=EPS)
    wide = torch.zeros(1, 2, 1025, device=DEVICE)
    with pytest.raises(ValueError, match=r"groups of up to 1024 channels; got 1025"):
        gated_group_norm(wide, None, wide[0, 0], groups=1, eps=EPS, backend="triton")
    with pytest.raises(ValueError, match=r"computes in float32; got torch\.float64"):
        gated_group_norm(y.double().to(DEVICE), None, weight.double().to(DEVICE), groups=2, eps=EPS, backend="triton")
