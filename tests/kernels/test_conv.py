"""The causal convolution: every backend against sums written out, with gradients; packing, prefill in parts, steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssmorph.kernels.conv import causal_conv, causal_conv_step, chunked, last_inputs

from .conftest import DEVICE

# the default is a batch of 1, width 4, bias and SiLU, neither past nor packed documents
CASES: dict[str, dict[str, Any]] = {
    "one-token": {"length": 1, "past": True, "packed": True},
    "three": {"length": 3, "batch": 2, "past": True},
    "width-2": {"length": 20, "width": 2, "past": True, "packed": True},
    "width-3": {"length": 35, "width": 3, "past": True, "packed": True},
    "bare": {"length": 63, "bias": False, "silu": False},
    "linear-packed": {"length": 40, "silu": False, "packed": True},
    "channels": {"length": 18, "channels": 70},
    "long": {"length": 200, "past": True, "packed": True},
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def documents(batch: int, length: int) -> Tensor:
    """Documents of 5, 1 and 7 tokens by turns in the first row, one document in the others."""
    sizes = [(5, 1, 7)[i % 3] for i in range(length)]
    row = torch.repeat_interleave(torch.arange(length), torch.tensor(sizes))[:length]
    return torch.cat([row[None], torch.zeros(batch - 1, length, dtype=torch.int64)]).to(DEVICE)


def inputs(
    length: int = 16, batch: int = 1, channels: int = 10, width: int = 4, bias: bool = True, silu: bool = True,
    past: bool = False, packed: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Any]]:  # fmt: skip
    tensors = {"x_BLC": draw(batch, length, channels), "weight_CK": draw(channels, width, seed=1)}
    if bias:
        tensors["bias_C"] = draw(channels, seed=2)
    if past:
        tensors["past_BKC"] = draw(batch, width - 1, channels, seed=3)
    return tensors, {"silu": silu, "segment_BL": documents(batch, length) if packed else None}


def by_hand(
    x_BLC: Tensor, weight_CK: Tensor, bias_C: Tensor | None = None, past_BKC: Tensor | None = None, *,
    silu: bool, segment_BL: Tensor | None,
) -> Tensor:  # fmt: skip
    keep = weight_CK.shape[1] - 1
    rows = []
    for b in range(x_BLC.shape[0]):
        for t in range(x_BLC.shape[1]):
            y = torch.zeros_like(x_BLC[b, t]) if bias_C is None else bias_C
            for age in range(keep + 1):
                s = t - age
                own = segment_BL is None or segment_BL[b, max(s, 0)] == segment_BL[b, t]
                if own and s >= 0:
                    y = y + weight_CK[:, keep - age] * x_BLC[b, s]
                elif own and past_BKC is not None:
                    y = y + weight_CK[:, keep - age] * past_BKC[b, s + keep]
            rows.append(F.silu(y) if silu else y)
    return torch.stack(rows).view(x_BLC.shape)


def with_gradients(function: Any, tensors: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    y = function(**leaves, **options)
    y.backward(draw(*y.shape, seed=9).to(y.dtype))
    return {"y": y.detach()} | {name: t.grad for name, t in leaves.items()}


def assert_close(own: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, value in expected.items():
        error = (own[name].double() - value.double()).abs().max()
        # NaN fails too
        assert error <= tolerance * value.abs().max().clamp_min(1), (name, error)


def fenced(t: Tensor) -> Tensor:
    """The same values in memory that holds NaN before, after and between the rows of the last dimension."""
    wide = t.new_full((t.shape[0] + 2, *t.shape[1:-1], t.shape[-1] + 16), float("nan"))
    wide[1:-1, ..., 8:-8] = t
    return wide[1:-1, ..., 8:-8]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_reference(case: dict[str, Any]) -> None:
    tensors, options = inputs(**case)
    expected = with_gradients(by_hand, tensors, **options)
    assert_close(with_gradients(causal_conv, tensors, **options, backend="reference"), expected, 1e-13)


@pytest.mark.parametrize("block", [chunked.CONV_BLOCK, 1], ids=["one-block", "blocks-of-16"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_chunked(case: dict[str, Any], block: int, monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    monkeypatch.setattr(chunked, "CONV_BLOCK", block)
    tensors, options = inputs(**case)
    expected = with_gradients(causal_conv, tensors, **options, backend="reference")
    assert_close(with_gradients(causal_conv, tensors, **options, backend="chunked"), expected, 1e-12)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_triton(case: dict[str, Any], poisoned: None, needs_triton: None) -> None:
    tensors, options = inputs(**case)
    expected = with_gradients(causal_conv, tensors, **options, backend="reference")
    single = {name: t.float() for name, t in tensors.items()}
    assert_close(with_gradients(causal_conv, single, **options, backend="triton"), expected, 2e-6)


@pytest.mark.parametrize("backend", ["chunked", "triton"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=str)
def test_half_types_round_once(dtype: torch.dtype, tolerance: float, backend: str, needs_triton: None) -> None:
    tensors, options = inputs(length=40, past=True, packed=True)
    half = {name: t.to(dtype) for name, t in tensors.items()}
    leaves = {name: t.double() for name, t in half.items()}
    # the gradient that comes in is rounded too
    dy = draw(*leaves["x_BLC"].shape, seed=9).to(dtype)
    own, expected = ({k: v.clone().requires_grad_() for k, v in side.items()} for side in (half, leaves))
    y, y_expected = causal_conv(**own, **options, backend=backend), causal_conv(**expected, **options)
    y.backward(dy)
    y_expected.backward(dy.double())
    assert y.dtype == dtype
    assert_close(
        {"y": y.detach()} | {k: v.grad for k, v in own.items()},
        {"y": y_expected.detach()} | {k: v.grad for k, v in expected.items()},
        tolerance,
    )


@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_reads_nothing_beside_its_inputs(backend: str, poisoned: None, needs_triton: None) -> None:
    tensors, options = inputs(length=37, batch=2, channels=24, past=True, packed=True)
    expected = with_gradients(causal_conv, tensors, **options, backend="reference")
    leaves = {name: t.float().requires_grad_() for name, t in tensors.items()}
    shapes = {"weight_CK": (24, 4), "bias_C": (24,)}
    views = {name: fenced(t) if name not in shapes else fenced(t[None])[0] for name, t in leaves.items()}
    y = causal_conv(**views, **options, backend=backend)
    y.backward(fenced(draw(*y.shape, seed=9).float()))
    assert_close({"y": y.detach()} | {name: t.grad for name, t in leaves.items()}, expected, 2e-6)


@pytest.mark.parametrize("backend", ["reference", "chunked", "triton"])
def test_a_broken_document_stays_alone(backend: str, needs_triton: None) -> None:
    x, weight = draw(1, 12, 3).float(), draw(3, 4, seed=1).float()
    segment = torch.tensor([[0] * 5 + [1] * 7], device=DEVICE)
    x[:, :5] = float("nan")
    leaf = x.requires_grad_()
    y = causal_conv(leaf, weight, segment_BL=segment, silu=True, backend=backend)
    y[:, 5:].sum().backward()
    assert y[:, :5].isnan().all()
    assert torch.allclose(y[:, 5:], causal_conv(x[:, 5:].detach(), weight, silu=True), atol=1e-6)
    assert leaf.grad[:, 5:].isfinite().all()


@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_same_bits_again(backend: str, needs_triton: None) -> None:
    tensors, options = inputs(length=150, channels=5)
    single = {name: t.float() for name, t in tensors.items()}
    first, second = (with_gradients(causal_conv, single, **options, backend=backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_chunked_against_finite_differences() -> None:
    tensors, options = inputs(length=7, channels=2, past=True, packed=True)
    leaves = tuple(t.requires_grad_() for t in tensors.values())
    assert torch.autograd.gradcheck(lambda *t: causal_conv(**dict(zip(tensors, t, strict=True)), **options), leaves)


def test_packed_equals_separate() -> None:
    x, weight, bias = draw(1, 12, 4), draw(4, 4, seed=1), draw(4, seed=2)
    segment = torch.tensor([[0] * 5 + [1] * 2 + [2] * 5], device=DEVICE)
    parts = [causal_conv(p, weight, bias, backend="chunked") for p in x.split([5, 2, 5], dim=1)]
    packed = causal_conv(x, weight, bias, segment_BL=segment, backend="chunked")
    assert torch.allclose(packed, torch.cat(parts, dim=1))
    assert not torch.allclose(packed, causal_conv(x, weight, bias, backend="chunked"))


@pytest.mark.parametrize("backend", ["reference", "chunked", "triton"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("width", [2, 3, 4])
def test_parts_and_steps_equal_the_whole(width: int, packed: bool, backend: str, needs_triton: None) -> None:
    x, weight, bias = draw(2, 21, 6).float(), draw(6, width, seed=1).float(), draw(6, seed=2).float()
    segment = documents(2, 21)[:, :19] if packed else torch.zeros(2, 19, dtype=torch.int64, device=DEVICE)
    segment = F.pad(segment, (0, 2), mode="replicate")
    whole = causal_conv(x, weight, bias, silu=True, segment_BL=segment, backend=backend)
    past, parts = None, []
    for part, own in zip(x.split([1, 8, 1, 9, 2], dim=1)[:4], segment.split([1, 8, 1, 9, 2], dim=1), strict=False):
        given = {"past_BKC": past, "segment_BL": own if packed else None}
        parts.append(causal_conv(part, weight, bias, silu=True, **given, backend=backend))
        past = last_inputs(part, width, **given)
    assert past is not None
    kept = past
    parts += [causal_conv_step(past, x[:, t], weight, bias, silu=True, backend=backend)[:, None] for t in (19, 20)]
    assert past is kept
    assert torch.equal(past, last_inputs(x, width, None, segment))
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-6)


def test_last_inputs_of_a_short_row() -> None:
    x, past = draw(1, 2, 3), draw(1, 3, 3, seed=1)
    assert torch.equal(last_inputs(x, 4, past), torch.cat([past[:, 2:], x], dim=1))
    assert torch.equal(last_inputs(x, 4), torch.cat([torch.zeros_like(x[:, :1]), x], dim=1))
    fresh = last_inputs(x, 4, past, torch.tensor([[0, 1]], device=DEVICE))
    assert torch.equal(fresh, torch.cat([torch.zeros_like(x), x[:, 1:]], dim=1))


@pytest.mark.parametrize("backend", ["reference", "chunked", "triton"])
def test_a_step_shifts_any_layout_in_place(backend: str, poisoned: None, needs_triton: None) -> None:
    x, weight, bias = draw(2, 6).float(), draw(6, 4, seed=1).float(), draw(6, seed=2).float()
    past = draw(2, 6, 3, seed=3).float().transpose(1, 2)
    expected = torch.cat([past[:, 1:], x[:, None]], dim=1)
    y = causal_conv(x[:, None], weight, bias, past_BKC=past.clone(), backend="reference")[:, 0]
    assert torch.allclose(causal_conv_step(past, fenced(x), weight, bias, backend=backend), y, atol=1e-6)
    assert torch.equal(past, expected)


def test_random_shapes() -> None:
    hypothesis = pytest.importorskip("hypothesis")
    number, flag = hypothesis.strategies.integers, hypothesis.strategies.booleans

    flags = {name: flag() for name in ("bias", "silu", "past", "packed")}
    sizes = {"length": number(1, 50), "batch": number(1, 3), "channels": number(1, 9), "width": number(2, 4)}

    @hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
    @hypothesis.given(hypothesis.strategies.fixed_dictionaries(sizes | flags))
    def agree(case: dict[str, Any]) -> None:
        tensors, options = inputs(**case)
        expected = with_gradients(causal_conv, tensors, **options, backend="reference")
        assert_close(with_gradients(causal_conv, tensors, **options, backend="chunked"), expected, 1e-12)

    agree()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"weight_CK": torch.zeros(4, 4)}, "weight_CK: needs 3 channels"),
        ({"weight_CK": torch.zeros(3, 5)}, "weight_CK: needs a width of 2 to 4"),
        ({"bias_C": torch.zeros(2)}, "bias_C: needs 3 channels"),
        ({"past_BKC": torch.zeros(1, 2, 3)}, "past_BKC: holds the 3 inputs before"),
        ({"segment_BL": torch.zeros(1, 5, dtype=torch.int64)}, "segment_BL: must be integers of shape"),
        ({"segment_BL": torch.zeros(1, 4)}, "segment_BL: must be integers of shape"),
        ({"x_BLC": torch.zeros(4, 3)}, r"x_BLC: must be floating point \[B, L, C\]"),
        ({"x_BLC": torch.zeros(1, 4, 3, dtype=torch.int64)}, "x_BLC: must be floating point"),
        ({"past_BKC": torch.zeros(1, 3, 3, dtype=torch.int64)}, "past_BKC: must be floating point"),
        ({"weight_CK": torch.zeros(3, 4, dtype=torch.int64)}, "weight_CK: must be floating point"),
        ({"backend": "chunky"}, "backend: must name a backend of causal_conv"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=rf"causal_conv\.{named}"):
        causal_conv(**{"x_BLC": torch.zeros(1, 4, 3), "weight_CK": torch.zeros(3, 4)} | change)
    if "past_BKC" in change:
        with pytest.raises(ValueError, match=rf"causal_conv_step\.{named}"):
            causal_conv_step(change["past_BKC"], torch.zeros(1, 3), torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"causal_conv_step\.x_BC: must be floating point \[B, C\]"):
        causal_conv_step(torch.zeros(1, 3, 3), torch.zeros(1, 1, 3), torch.zeros(3, 4))


def test_triton_refuses_double(needs_triton: None) -> None:
    with pytest.raises(ValueError, match=r"causal_conv\.backend.*float64"):
        causal_conv(draw(1, 4, 3), draw(3, 4), backend="triton")
