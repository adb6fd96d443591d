"""The relation loss in Triton, under its interpreter or on a GPU, against both relations written out in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ssmorph.kernels.relation import relation_loss
from tests.kernels.conftest import DEVICE
from tests.kernels.sizes import LargestTensor
from tests.kernels.test_conv import fenced
from tests.kernels.test_relation import HEADS, padding, problem, run

pytest.importorskip("triton")

# each two of length, mask, padding, widths and dtype together at least once, but for lengths, which meet some of them
CASES = {
    "one-token": (1, True, False, (5, 8), torch.float32),
    "one-token-full": (1, False, True, (16, 5), torch.float16),
    "three": (3, True, True, (64, 8), torch.bfloat16),
    "three-full": (3, False, False, (5, 16), torch.float32),
    "odd": (63, True, False, (8, 64), torch.float16),
    "tile": (64, False, False, (64, 64), torch.bfloat16),
    "ragged": (130, True, True, (80, 16), torch.float16),
    "ragged-full": (130, False, True, (16, 80), torch.bfloat16),
    "wide": (100, False, False, (128, 64), torch.float16),
    "long": (200, True, True, (16, 64), torch.float32),
    "long-full": (200, False, True, (64, 16), torch.float32),
    "long-half": (200, True, False, (64, 128), torch.bfloat16),
}
TOLERANCES = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def wide_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 in the tiles that half types ship with: the interpreter's time is by tile, whatever its size."""
    from ssmorph.kernels.relation import triton

    rows = tuple(replace(row, rows=64) for row in triton.LAUNCHES["sm_90", 4])
    if DEVICE.type == "cpu":
        monkeypatch.setitem(triton.LAUNCHES, ("sm_90", 4), rows)


def assert_near(tensors: list[Tensor], dtype: Any, **options: Any) -> None:
    """The loss to float32's precision and the gradient to the dtype's, of the largest value of each."""
    rounded = [t.to(DEVICE, dtype) for t in tensors]
    wanted = run([t.double() for t in rounded], "reference", **options)
    tolerances = (3e-6, TOLERANCES[dtype])
    for found, exact, tolerance in zip(run(rounded, "triton", **options), wanted, tolerances, strict=True):
        error, largest = (found.double() - exact).abs().max(), exact.abs().max()
        assert error <= tolerance * largest, f"{error} of {largest}"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_triton_equals_reference(poisoned: None, case: tuple[int, bool, bool, tuple[int, int], Any]) -> None:
    length, causal, padded, (own, other), dtype = case
    tensors = problem(length, batch=2 if padded else 1, own=own, other=other)
    valid_BL = padding(length).to(DEVICE) if padded else None
    # a row that sees itself alone costs nothing: the error is of nothing, too
    assert_near(tensors, dtype, causal=causal, valid_BL=valid_BL)


def test_dtypes_of_the_sides_may_differ(poisoned: None) -> None:
    student, teacher = (t.to(DEVICE) for t in problem(70, batch=1))
    mixed = [student.float(), teacher.bfloat16()]
    wanted = run([t.double() for t in mixed], "reference")
    for found, exact in zip(run(mixed, "triton"), wanted, strict=True):
        assert (found.double() - exact).abs().max() <= 3e-6 * exact.abs().max()


@pytest.mark.parametrize("causal", [True, False])
def test_a_student_near_its_teacher(causal: bool) -> None:
    """A divergence of 1e-6 is what is left of terms near 1 and of log-sums near 10."""
    teacher = 2 * problem(100, batch=1)[1]
    student = teacher + 1e-3 * torch.randn_like(teacher)
    rounded = [student.float().to(DEVICE), teacher.float().to(DEVICE)]
    wanted = run([t.double() for t in rounded], "reference", causal=causal)[0]
    assert wanted.max() < 3e-6
    assert (run(rounded, "triton", causal=causal)[0].double() - wanted).abs().max() <= 1e-2 * wanted.max()


@pytest.mark.parametrize("causal", [True, False])
def test_padded_tokens_have_no_influence(poisoned: None, causal: bool) -> None:
    tensors, valid_BL = [t.float().to(DEVICE) for t in problem(130)], padding(130).to(DEVICE)
    first = run(tensors, "triton", causal=causal, valid_BL=valid_BL)
    for t in tensors:
        t[~valid_BL] = float("nan")
    second = run(tensors, "triton", causal=causal, valid_BL=valid_BL)
    assert all(torch.equal(before, after) for before, after in zip(first, second, strict=True))
    assert second[1][~valid_BL].abs().max() == 0


def test_nothing_valid_costs_nothing(poisoned: None) -> None:
    tensors = [t.float().to(DEVICE) for t in problem(9)]
    for causal in (True, False):
        loss_H, grad = run(tensors, "triton", causal=causal, valid_BL=torch.zeros(2, 9, dtype=torch.bool).to(DEVICE))
        assert loss_H.tolist() == [0.0] * HEADS
        assert grad.abs().max() == 0


@pytest.mark.parametrize("shape", [(2, 0, 6), (0, 4, 6)])
def test_empty(shape: tuple[int, ...]) -> None:
    loss_H, grad = run([torch.zeros(shape, device=DEVICE), torch.zeros(shape, device=DEVICE)], "triton")
    assert loss_H.tolist() == [0.0] * HEADS
    assert grad.shape == shape


def test_inputs_with_gaps_between_rows(poisoned: None) -> None:
    plain = [t.float().to(DEVICE) for t in problem(70, own=16, other=5)]
    wanted = run(plain, "triton")
    student = plain[0].clone().requires_grad_()
    loss_H = relation_loss(fenced(student), fenced(plain[1]), heads=HEADS, per_head=True, backend="triton")
    loss_H.backward(torch.arange(1.0, HEADS + 1, device=DEVICE))
    assert torch.equal(loss_H.detach(), wanted[0])
    assert torch.equal(student.grad, wanted[1])


def test_kernels_stay_within_their_inputs(poisoned: None) -> None:
    """In one buffer with NaN around the tensors: what is read too far shows in the results, what is written there."""
    from ssmorph.kernels.relation.problem import Problem
    from ssmorph.kernels.relation.triton import LAUNCHES, _run

    student, teacher = (t.float().unflatten(-1, (HEADS, -1)) for t in problem(70, batch=1, own=16, other=5))
    counts = torch.tensor([70], dtype=torch.int32, device=DEVICE)
    row = LAUNCHES["sm_90", 4][0]
    for causal in (True, False):
        results = []
        for gap in (0, 4096):
            canvas = torch.full((2 * gap + 70 * 21 * HEADS + gap,), float("nan"), device=DEVICE)
            x = canvas[gap:][: student.numel()].view(student.shape).copy_(student)
            y = canvas[2 * gap + x.numel() :][: teacher.numel()].view(teacher.shape).copy_(teacher)
            results.append(_run(x, y, counts, Problem(y, 0.25, 0.4, causal, None), row, True))
            assert canvas.isnan().sum() == 3 * gap
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_tokens_that_do_not_count_are_given_no_gradient(poisoned: None) -> None:
    """By the kernel already, and not only by the mask before it."""
    from ssmorph.kernels.relation.problem import Problem
    from ssmorph.kernels.relation.triton import relation_triton

    student, teacher = (t.float().to(DEVICE).unflatten(-1, (HEADS, -1)) for t in problem(70))
    valid_BL = padding(70).to(DEVICE)
    for causal in (True, False):
        leaf = student.clone().requires_grad_()
        relation_triton(leaf, Problem(teacher, 0.4, 0.4, causal, valid_BL)).sum().backward()
        assert leaf.grad[~valid_BL].abs().max() == 0


def test_same_bits_again_and_without_gradients() -> None:
    tensors = [t.float().to(DEVICE) for t in problem(70)]
    first, second = (run(tensors, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    alone = relation_loss(*tensors, heads=HEADS, per_head=True, backend="triton")
    assert not alone.requires_grad
    assert torch.equal(alone, first[0])


def test_no_tensor_reaches_length_squared() -> None:
    tensors = [t.float().to(DEVICE) for t in problem(200, batch=1)]
    with LargestTensor() as largest:
        run(tensors, "triton", valid_BL=torch.ones(1, 200, dtype=torch.bool, device=DEVICE))
    # the interpreter copies inputs, as bytes
    assert largest.numel < 200 * 200


def test_refusals_name_the_rule() -> None:
    with pytest.raises(ValueError, match=r"relation_loss\.backend: 'triton' computes in float32; got torch\.float64"):
        run([t.to(DEVICE) for t in problem(4)], "triton")
    with pytest.raises(ValueError, match=r"relation heads up to 128 wide .* got 300\. Use more heads"):
        run([t.float().to(DEVICE) for t in problem(4, own=300)], "triton")
