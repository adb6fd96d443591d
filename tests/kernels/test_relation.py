"""The relation loss: blocks of rows against both relations written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssmorph.kernels.relation import relation_loss
from tests.kernels.sizes import LargestTensor

HEADS = 3


def problem(length: int, *, batch: int = 2, own: int = 5, other: int = 8, dtype: Any = torch.float64) -> list[Tensor]:
    """Student and teacher with relation heads of `own` and `other` numbers."""
    torch.manual_seed(length)
    return [torch.randn(batch, length, HEADS * width, dtype=torch.float64).to(dtype) for width in (own, other)]


def padding(length: int) -> Tensor:
    """The first sequence padded on the left, the second in the middle and on the right."""
    valid_BL = torch.ones(2, length, dtype=torch.bool)
    valid_BL[0, : length // 2] = False
    valid_BL[1, length // 8 : length // 4 + 1] = False
    valid_BL[1, -(length // 9) - 1 :] = False
    return valid_BL


def run(tensors: list[Tensor], backend: str, **options: Any) -> list[Tensor]:
    """The loss per head, and the student's gradient of a weighted sum of it."""
    student, teacher = (t.clone() for t in tensors)
    loss_H = relation_loss(
        student.requires_grad_(), teacher, **{"heads": HEADS, "per_head": True, "backend": backend, **options}
    )
    weights_H = torch.arange(1.0, len(loss_H) + 1, dtype=loss_H.dtype, device=loss_H.device)
    return [loss_H.detach(), *torch.autograd.grad((loss_H * weights_H).sum(), student)]


def assert_same(tensors: list[Tensor], **options: Any) -> None:
    for found, wanted in zip(run(tensors, "chunked", **options), run(tensors, "reference", **options), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 3, 63, 130, 300])
def test_chunked_equals_reference(poisoned: None, length: int, causal: bool, padded: bool) -> None:
    assert_same(problem(length), causal=causal, valid_BL=padding(length) if padded else None)


@pytest.mark.parametrize(
    ("heads", "widths", "options"),
    [
        (1, (12, 12), {}),
        (4, (12, 8), {"student_scale": 0.3}),
        (2, (2, 64), {"teacher_scale": 0.7, "causal": False}),
        (6, (6, 30), {"student_scale": 1.5, "teacher_scale": 0.01}),
    ],
)
def test_widths_and_scales(poisoned: None, heads: int, widths: tuple[int, int], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    assert_same([torch.randn(2, 70, width, dtype=torch.float64) for width in widths], heads=heads, **options)


def test_reference_is_the_mean_divergence_of_softmax_relations() -> None:
    student, teacher = problem(7, batch=1)
    wanted = 0.0
    for h in range(HEADS):
        x, y = student[0, :, 5 * h : 5 * h + 5], teacher[0, :, 8 * h : 8 * h + 8]
        for t in range(7):
            p, q = torch.softmax(y[: t + 1] @ y[t] / 8**0.5, 0), torch.softmax(x[: t + 1] @ x[t] / 5**0.5, 0)
            wanted += float(F.kl_div(q.log(), p, reduction="sum")) / (7 * HEADS)
    found = relation_loss(student, teacher, heads=HEADS, backend="reference")
    assert float(found) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_of_the_reference_by_finite_differences(causal: bool) -> None:
    student, teacher = problem(6)

    def function(x: Tensor) -> Tensor:
        return relation_loss(x, teacher, heads=HEADS, causal=causal, valid_BL=padding(6), backend="reference")

    assert torch.autograd.gradcheck(function, student.requires_grad_())


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("causal", [True, False])
def test_padded_tokens_have_no_influence(causal: bool, backend: str) -> None:
    tensors, valid_BL = problem(150), padding(150)
    first = run(tensors, backend, causal=causal, valid_BL=valid_BL)
    for t in tensors:
        t[~valid_BL] = float("nan")
    second = run(tensors, backend, causal=causal, valid_BL=valid_BL)
    for before, after in zip(first, second, strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert second[1][~valid_BL].abs().max() == 0


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("causal", [True, False])
def test_padded_sequence_equals_the_sequence_alone(causal: bool, backend: str) -> None:
    tensors = problem(70, batch=1)
    alone = run(tensors, backend, causal=causal)
    padded = [torch.cat([torch.ones_like(t[:, :20]), t], 1) for t in tensors]
    together = run(padded, backend, causal=causal, valid_BL=torch.arange(90)[None] >= 20)
    torch.testing.assert_close(together[0], alone[0])
    torch.testing.assert_close(together[1][:, 20:], alone[1])


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_nothing_valid_costs_nothing(poisoned: None, backend: str) -> None:
    for valid_BL in (torch.zeros(2, 9, dtype=torch.bool), torch.arange(9).expand(2, 9) < torch.tensor([[0], [5]])):
        loss_H, grad = run(problem(9), backend, valid_BL=valid_BL)
        assert grad[0].abs().max() == 0
        assert loss_H.isfinite().all()
        assert bool((loss_H == 0).all()) == (not valid_BL.any())


@pytest.mark.parametrize("shape", [(2, 0, 6), (0, 4, 6)])
def test_empty(shape: tuple[int, ...]) -> None:
    loss_H, grad = run([torch.zeros(shape), torch.zeros(shape)], "chunked")
    assert loss_H.tolist() == [0.0] * HEADS
    assert grad.shape == shape


def test_a_student_that_is_the_teacher_costs_nothing() -> None:
    student = problem(140)[0]
    loss_H, grad = run([student, student], "chunked")
    assert loss_H.abs().max() < 1e-14
    assert grad.abs().max() < 1e-14


@pytest.mark.parametrize("causal", [True, False])
def test_float32_is_near_float64(causal: bool) -> None:
    for found, wanted in zip(
        run([4 * t.float() for t in problem(300)], "chunked", causal=causal),
        run([4 * t.float().double() for t in problem(300)], "reference", causal=causal),
        strict=True,
    ):
        assert found.dtype == torch.float32
        assert (found.double() - wanted).abs().max() <= 3e-6 * wanted.abs().max()


def test_half_precision_is_computed_in_float32_even_under_autocast() -> None:
    tensors = problem(20, dtype=torch.bfloat16)
    wanted = run([t.float() for t in tensors], "chunked")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_H, grad = run(tensors, "chunked")
    torch.testing.assert_close(loss_H, wanted[0])
    torch.testing.assert_close(grad, wanted[1].bfloat16())


def test_mean_over_heads_is_the_loss_and_the_teacher_gets_no_gradient() -> None:
    student, teacher = problem(40)
    loss = relation_loss(student.requires_grad_(), teacher.requires_grad_(), heads=HEADS)
    torch.testing.assert_close(loss.detach(), run([student.detach(), teacher.detach()], "chunked")[0].mean())
    loss.backward()
    assert teacher.grad is None


def test_same_bits_again() -> None:
    single = [t.float() for t in problem(150)]
    first, second = (run(single, "chunked") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("causal", [True, False])
def test_no_tensor_reaches_length_squared(causal: bool) -> None:
    tensors = problem(1024, batch=1)
    with LargestTensor() as chunked:
        run(tensors, "chunked", causal=causal)
    # three buffers for a block of rows
    assert chunked.numel < 1024 * 1024 / 2
    with LargestTensor() as reference:
        run(tensors, "reference", causal=causal)
    assert reference.numel >= 1024 * 1024


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 4}, r"relation_loss.heads: must be positive and divide the width 15 of student_BLW; got 4\. Choose"),
        ({"heads": 0}, "must be positive"),
        ({"heads": 5}, "width 24 of teacher_BLV; got 5"),
        ({"student_BLW": torch.zeros(8, 15)}, r"student_BLW: has batch, length and width; got \(8, 15\)"),
        ({"teacher_BLV": torch.zeros(2, 9, 24)}, r"teacher_BLV: must be \[2, 8, width\] .* got \(2, 9, 24\)"),
        ({"teacher_BLV": torch.zeros(2, 8, 24, dtype=torch.int64)}, "must be floating-point; got torch.int64"),
        ({"student_BLW": torch.zeros(2, 8, 0)}, "divide the width 0"),
        ({"valid_BL": torch.ones(2, 8)}, "valid_BL: must be boolean, True at tokens; got torch.float32"),
        ({"valid_BL": torch.ones(2, 9, dtype=torch.bool)}, r"must have shape \(2, 8\); got \(2, 9\)"),
        ({"backend": "chunkd"}, "'chunked'"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    student, teacher = problem(8)
    with pytest.raises(ValueError, match=message):
        relation_loss(**{"student_BLW": student, "teacher_BLV": teacher, "heads": HEADS, **change})
