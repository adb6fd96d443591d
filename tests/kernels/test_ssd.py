"""The scan: chunked against the recurrence, forward, every gradient and the final state; packing, prefill and steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssmorph.kernels.ssd import ssd, ssd_step

CASES = {
    "one-token": {"length": 1},
    "three": {"length": 3},
    "odd-batch": {"batch": 3, "length": 63},
    "chunk": {"length": 64},
    "long": {"length": 200, "heads": 3},
    "groups": {"length": 70, "heads": 9, "groups": 3},
    "one-group": {"length": 65, "heads": 9, "groups": 1},
    "wide": {"length": 90, "width": 5, "state": 7},
}


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


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_chunked_equals_recurrence(case: dict[str, int], poisoned: None) -> None:
    tensors = inputs(**case)
    assert_same(outputs_and_gradients(tensors, "chunked"), outputs_and_gradients(tensors, "reference"))


@pytest.mark.parametrize("decay", [0.0, 50.0], ids=["none", "total"])
def test_extreme_decay(decay: float) -> None:
    tensors = inputs(length=130, decay=decay)
    assert_same(outputs_and_gradients(tensors, "chunked"), outputs_and_gradients(tensors, "reference"))


@pytest.mark.parametrize("absent", ["w_BLH", "D_H", "initial_state_BHPN"])
def test_optional_inputs(absent: str) -> None:
    tensors = inputs(length=70)
    del tensors[absent]
    assert_same(outputs_and_gradients(tensors, "chunked"), outputs_and_gradients(tensors, "reference"))


@pytest.mark.parametrize("lengths", [(5, 60, 64, 1, 21), (1, 1, 1), (64, 64)], ids=str)
def test_packed_documents(lengths: tuple[int, ...]) -> None:
    tensors = inputs(length=sum(lengths))
    del tensors["initial_state_BHPN"]
    segment_BL = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    both = [outputs_and_gradients(tensors, backend, segment_BL=segment_BL) for backend in ("chunked", "reference")]
    assert_same(*both)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    parts = []
    for start, length in zip(starts, lengths, strict=True):
        own = {n: (t if n == "D_H" else t[:, start : start + length]) for n, t in tensors.items()}
        parts.append(ssd(**own)[0])
    assert (torch.cat(parts, dim=1) - both[0][0]).abs().max() < 1e-10


def test_prefill_in_chunks_then_steps() -> None:
    t = inputs(batch=2, length=150, heads=4, groups=2)
    full, final = ssd(**t)
    sequence = [n for n in t if n not in ("D_H", "initial_state_BHPN")]
    state, parts = t["initial_state_BHPN"], []
    for start, end in ((0, 37), (37, 38), (38, 120)):
        y, state = ssd(**{n: t[n][:, start:end] for n in sequence}, D_H=t["D_H"], initial_state_BHPN=state)
        parts.append(y)
    state = state.clone()
    for i in range(120, 150):
        own = {n: t[n][:, i] for n in sequence}
        y = ssd_step(
            state, own["x_BLHP"], own["log_a_BLH"], own["B_BLGN"], own["C_BLGN"], w_BH=own["w_BLH"], D_H=t["D_H"]
        )
        parts.append(y.unsqueeze(1))
    assert (torch.cat(parts, 1) - full).abs().max() < 1e-10
    assert (state - final).abs().max() < 1e-10


def test_the_state_matters() -> None:
    t = inputs(length=20)
    with_state = ssd(**t)[0]
    without = ssd(**{**t, "initial_state_BHPN": torch.zeros_like(t["initial_state_BHPN"])})[0]
    assert (with_state - without).abs().max() > 1e-2


def test_finite_differences() -> None:
    tensors = {n: t.requires_grad_() for n, t in inputs(length=5, width=2, state=2).items()}
    names = list(tensors)

    def call(*values: Tensor) -> tuple[Tensor, Tensor]:
        return ssd(**dict(zip(names, values, strict=True)), backend="reference")

    assert torch.autograd.gradcheck(call, tuple(tensors.values()))


def test_half_precision_keeps_a_float32_state() -> None:
    t = inputs(length=100)
    expected = ssd(**t)[0]
    y, state = ssd(**{n: v.bfloat16() for n, v in t.items()})
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert (y.double() - expected).abs().max() / expected.abs().max() < 3e-2


def test_noncontiguous_inputs() -> None:
    t = inputs(batch=2, length=40)
    turned = {n: (v.transpose(0, 1).contiguous().transpose(0, 1) if v.dim() > 1 else v) for n, v in t.items()}
    assert torch.equal(ssd(**t)[0], ssd(**turned)[0])
