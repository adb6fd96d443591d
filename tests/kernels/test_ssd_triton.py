"""The Triton scan against the recurrence: forward, gradients, final state; sections, packing, canaries, launches."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ssmorph.kernels.common.launch import recorded
from ssmorph.kernels.ssd import (
    ssd,
    ssd_step,
    triton_plan,
)

from .conftest import DEVICE
from .test_ssd import inputs, outputs_and_gradients

NAMES = ("y", "state", "x_BLHP", "log_a_BLH", "B_BLGN", "C_BLGN", "w_BLH", "D_H", "initial_state_BHPN")
OPTIONAL = ("w_BLH", "D_H", "initial_state_BHPN")

# every length, group count, width and option at least once with each other's neighbours, not all with all
CASES = {
    "one-token": {"length": 1},
    "three": {"length": 3, "batch": 3, "heads": 1},
    "odd": {"length": 63, "groups": 1, "width": 16, "state": 16},
    "chunk": {"length": 64, "absent": ("D_H",)},
    "unequal": {"length": 130, "width": 5, "state": 80, "absent": ("w_BLH",)},
    "groups": {"length": 70, "heads": 4, "groups": 2, "width": 80, "state": 7},
    "tiles": {"length": 66, "heads": 1, "width": 96, "state": 64},
    "bare": {"length": 200, "absent": OPTIONAL},
    "long": {"length": 500, "heads": 1, "width": 64, "state": 64},
}


@pytest.fixture(params=["whole", "sections"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Sequences walked whole, or cut at every chunk so that all the section kernels run."""
    monkeypatch.setattr(triton_plan, "SHORTEST", 1 if request.param == "sections" else 10**6)
    return request.param


def case_inputs(case: dict, **more: float) -> dict[str, Tensor]:
    absent = case.get("absent", ())
    tensors = inputs(**{k: v for k, v in {**case, **more}.items() if k != "absent"})
    return {n: t.to(DEVICE) for n, t in tensors.items() if n not in absent}


def assert_close(tensors: dict[str, Tensor], dtype: torch.dtype, tolerance: float, **options: Tensor) -> None:
    """Triton on the inputs rounded to `dtype` against the reference on the same numbers in float64."""
    rounded = {n: t.to(dtype) for n, t in tensors.items()}
    own = outputs_and_gradients(rounded, "triton", **options)
    expected = outputs_and_gradients({n: t.double() for n, t in rounded.items()}, "reference", **options)
    names = [n for n in NAMES if n in tensors or n in ("y", "state")]
    for name, a, b in zip(names, own, expected, strict=True):
        error = (a.double() - b).abs().max() / b.abs().max().clamp_min(1e-3)
        assert error <= tolerance, f"{name}: {float(error):.1e}"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_recurrence(case: dict, cut: str, poisoned: None) -> None:
    assert_close(case_inputs(case), torch.float32, 5e-6)


@pytest.mark.parametrize("decay", [0.0, 50.0], ids=["none", "total"])
def test_extreme_decay(decay: float, cut: str) -> None:
    assert_close(case_inputs({"length": 130}, decay=decay), torch.float32, 3e-5)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 1.5e-2), (torch.float16, 2e-3)], ids=["bf16", "fp16"]
)
def test_half_precision(dtype: torch.dtype, tolerance: float, cut: str) -> None:
    assert_close(case_inputs({"length": 130, "heads": 1, "width": 16, "state": 16}), dtype, tolerance)


def test_the_decay_gradient_in_bfloat16_comes_from_unrounded_sums() -> None:
    case = {"length": 200, "heads": 1, "width": 64, "state": 64}
    tensors = {n: t.to(torch.bfloat16) for n, t in case_inputs(case).items()}
    tensors["log_a_BLH"] = tensors["log_a_BLH"].float()
    own = outputs_and_gradients(tensors, "triton")[3].double()
    expected = outputs_and_gradients({n: t.double() for n, t in tensors.items()}, "reference")[3]
    error = (own - expected).abs().max() / expected.abs().max()
    assert error <= 5e-3


@pytest.mark.parametrize("lengths", [(5, 60, 64, 1, 21), (64, 64), (1, 1, 1)], ids=str)
def test_packed_documents(lengths: tuple[int, ...], cut: str) -> None:
    tensors = case_inputs({"length": sum(lengths)})
    segment_BL = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].to(DEVICE)
    assert_close(tensors, torch.float32, 5e-6, segment_BL=segment_BL)


def with_canaries(t: Tensor) -> Tensor:
    """The same values between NaNs, rows apart: whoever reads outside its rows or columns gets one."""
    holder = t.new_full((*(n + 2 for n in t.shape[:-1]), t.shape[-1] + 16), float("nan"))
    inner = holder[tuple(slice(1, n + 1) for n in t.shape[:-1])][..., 8 : 8 + t.shape[-1]]
    inner.copy_(t)
    return inner


@pytest.mark.parametrize("length", [1, 63, 130])
def test_reads_nothing_outside_its_tensors(length: int, cut: str) -> None:
    plain = {n: t.float() for n, t in case_inputs({"length": length, "batch": 2, "width": 5, "state": 7}).items()}
    fenced = {n: with_canaries(t) if n in ("x_BLHP", "B_BLGN", "C_BLGN") else t for n, t in plain.items()}
    y, state = ssd(**plain, backend="triton")
    fenced_y, fenced_state = ssd(**fenced, backend="triton")
    assert torch.equal(y, fenced_y)
    assert torch.equal(state, fenced_state)


def test_is_deterministic(cut: str) -> None:
    tensors = {n: t.float() for n, t in case_inputs({"length": 200}).items()}
    both = [outputs_and_gradients(tensors, "triton") for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


def test_steps_continue_the_scan() -> None:
    t = {n: v.float() for n, v in case_inputs({"length": 20, "batch": 2, "heads": 4, "groups": 2, "width": 20}).items()}
    expected, final = ssd(**t, backend="triton")
    state, sequence = t["initial_state_BHPN"].clone(), [n for n in t if n not in ("D_H", "initial_state_BHPN")]
    for i in range(20):
        own = {n.replace("BL", "B"): t[n][:, i] for n in sequence}
        y = ssd_step(state, *(own[n] for n in ("x_BHP", "log_a_BH", "B_BGN", "C_BGN")), w_BH=own["w_BH"], D_H=t["D_H"],
                     backend="triton")  # fmt: skip
        assert (y - expected[:, i]).abs().max() < 1e-5 * expected.abs().max()
    assert (state - final).abs().max() < 1e-5 * final.abs().max()


def launches(length: int, heads: int) -> tuple[Counter, Counter]:
    """How many kernels a forward and a backward pass start."""
    with recorded("sm_90") as kernels:
        t = {n: v.to("meta", torch.bfloat16).requires_grad_() for n, v in inputs(length=length, heads=heads).items()}
        y, final = ssd(**t, backend="triton")
        forward = Counter(k.name.split()[0] for k in kernels)
        kernels.clear()
        torch.autograd.backward([y, final], [torch.empty_like(y), torch.empty_like(final)])
    return forward, Counter(k.name.split()[0] for k in kernels)


def test_two_launches_forwards_and_four_backwards() -> None:
    assert launches(2048, 1) == (Counter({"ssd.sections": 1, "ssd.walk": 1}), Counter({"ssd.walk": 3, "ssd.finish": 1}))
    assert launches(64, 64) == (Counter({"ssd.walk": 1}), Counter({"ssd.walk": 3, "ssd.finish": 1}))


def test_what_cannot_run_is_refused_by_name() -> None:
    tensors = case_inputs({"length": 8})
    with pytest.raises(ValueError, match=r"'triton' computes in float32; got torch.float64"):
        ssd(**tensors, backend="triton")
    wide = {n: t.float() for n, t in case_inputs({"length": 2, "width": 300}).items()}
    with pytest.raises(ValueError, match=r"holds widths up to \d+ .*got 300.*chunked"):
        ssd(**wide, backend="triton")
