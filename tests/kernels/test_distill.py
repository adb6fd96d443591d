"""The distillation losses: chunks of tokens against all logits written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ssmorph.kernels.distill import DIVERGENCES, distill_loss
from tests.kernels.sizes import LargestTensor

STUDENT = ("student_TD", "student_head_VD", "student_bias_V")


def problem(
    tokens: int = 21, vocabulary: int = 17, *, bias: bool = True, dtype: Any = torch.float64
) -> dict[str, Tensor]:
    """Tensors of distill_loss: a student of width 5 and a teacher of width 8."""
    torch.manual_seed(tokens)
    shapes = {
        "student_TD": (tokens, 5),
        "student_head_VD": (vocabulary, 5),
        "teacher_TE": (tokens, 8),
        "teacher_head_VE": (vocabulary, 8),
    }
    if bias:
        shapes |= {"student_bias_V": (vocabulary,), "teacher_bias_V": (vocabulary,)}
    return {name: torch.randn(shape, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


def labels(tokens: int = 21) -> Tensor:
    labels_T = torch.arange(tokens) % 17
    labels_T[::4] = -100
    return labels_T


def run(made: dict[str, Tensor], backend: str, **options: Any) -> list[Tensor]:
    """The loss and its gradients for the student's tensors given."""
    made = {name: t.clone().requires_grad_(name in STUDENT) for name, t in made.items()}
    loss = distill_loss(**made, backend=backend, **options)  # type: ignore[arg-type]
    return [loss, *torch.autograd.grad(3 * loss, [made[name] for name in STUDENT if name in made])]


def assert_same(made: dict[str, Tensor], **options: Any) -> list[Tensor]:
    found = run(made, "chunked", **{"chunk": 8, **options})
    for ours, wanted in zip(found, run(made, "reference", **options), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10)
        assert ours.isfinite().all()
    return found


@pytest.mark.parametrize("loss", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("ce_weight", [0.0, 0.7])
def test_chunked_equals_reference(poisoned: None, loss: str, temperature: float, ce_weight: float) -> None:
    assert_same(problem(), loss=loss, temperature=temperature, ce_weight=ce_weight, labels_T=labels())


@pytest.mark.parametrize("loss", DIVERGENCES)
@pytest.mark.parametrize("chunk", [1, 7, 21, 100])
def test_any_chunk(poisoned: None, loss: str, chunk: int) -> None:
    assert_same(problem(bias=False), loss=loss, chunk=chunk)


@pytest.mark.parametrize("loss", DIVERGENCES)
@pytest.mark.parametrize(
    "options",
    [
        {"student_softcap": 2.0},
        {"teacher_softcap": 2.0, "student_scale": 0.3},
        {"student_softcap": 1.5, "teacher_softcap": 3.0, "student_scale": 0.5, "teacher_scale": 2.0},
    ],
)
def test_scaled_and_capped_logits(poisoned: None, loss: str, options: dict[str, float]) -> None:
    assert_same(problem(), loss=loss, temperature=2.0, ce_weight=0.4, labels_T=labels(), **options)


@pytest.mark.parametrize("loss", DIVERGENCES)
def test_masked_tokens_do_not_count(poisoned: None, loss: str) -> None:
    mask_T = torch.arange(21) % 3 > 0
    made, options = problem(), {"loss": loss, "temperature": 2.0, "ce_weight": 0.3}
    masked = assert_same(made, mask_T=mask_T, labels_T=labels(), **options)
    kept = {n: t[mask_T] if n in ("student_TD", "teacher_TE") else t for n, t in made.items()}
    alone = run(kept, "chunked", labels_T=labels()[mask_T], **options)
    torch.testing.assert_close(masked[0], alone[0])
    assert masked[1][~mask_T].abs().max() == 0


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_nothing_to_count_is_zero(backend: str) -> None:
    options: dict[str, Any] = {"ce_weight": 1.0, "labels_T": labels(), "mask_T": torch.zeros(21, dtype=torch.bool)}
    for t in run(problem(), backend, **options):
        assert t.abs().max() == 0
    unlabelled = run(problem(), backend, ce_weight=1.0, labels_T=torch.full((21,), -100))
    torch.testing.assert_close(unlabelled[0], run(problem(), backend)[0])


@pytest.mark.parametrize("loss", DIVERGENCES)
def test_impossible_tokens_give_no_nan(poisoned: None, loss: str) -> None:
    made = problem()
    made["teacher_bias_V"][3:6] = -math.inf
    assert_same(made, loss=loss, temperature=2.0)
    made["student_bias_V"][3:5] = -math.inf
    assert_same(made, loss=loss, temperature=0.5)


@pytest.mark.parametrize("loss", DIVERGENCES)
def test_a_student_that_is_the_teacher_costs_nothing(loss: str) -> None:
    made = problem(bias=False)
    made["student_TD"], made["student_head_VD"] = made["teacher_TE"], made["teacher_head_VE"]
    for t in run(made, "chunked", loss=loss, temperature=2.0):
        assert t.abs().max() < 1e-12


def test_kl_in_one_case_by_hand() -> None:
    half, third = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    eye = torch.eye(2)
    forward = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    backward = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    for backend in ("chunked", "reference"):
        assert distill_loss(third, eye, half, eye, backend=backend).item() == pytest.approx(forward, rel=1e-5)
        reverse = distill_loss(third, eye, half, eye, loss="reverse_kl", backend=backend)
        assert reverse.item() == pytest.approx(backward, rel=1e-5)


@pytest.mark.parametrize(("beta", "limit"), [(1e-6, "kl"), (1 - 1e-6, "reverse_kl")])
def test_jsd_tends_to_the_divergences(beta: float, limit: str) -> None:
    found = run(problem(), "chunked", loss="jsd", beta=beta, temperature=2.0)
    for jsd, wanted in zip(found, run(problem(), "chunked", loss=limit, temperature=2.0), strict=True):
        torch.testing.assert_close(jsd / (beta * (1 - beta)), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("loss", DIVERGENCES)
def test_gradients_of_the_reference_by_finite_differences(loss: str) -> None:
    made = problem(3, 4)

    def function(*tensors: Tensor) -> Tensor:
        changed = {**made, **dict(zip(STUDENT, tensors, strict=True))}
        options: dict[str, Any] = {"temperature": 2.0, "ce_weight": 0.5, "labels_T": torch.tensor([1, -100, 3])}
        return distill_loss(**changed, loss=loss, backend="reference", student_softcap=2.0, **options)  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(function, [made[name].requires_grad_() for name in STUDENT])


@pytest.mark.parametrize("trained", [("student_TD",), ("student_head_VD",), ("student_bias_V",), ()])
def test_only_what_is_trained_gets_a_gradient(trained: tuple[str, ...]) -> None:
    made = problem(64, 32)
    full = dict(zip(STUDENT, run(made, "chunked", chunk=8)[1:], strict=True))
    for name in trained:
        made[name].requires_grad_()
    with LargestTensor() as record:
        loss = distill_loss(**made, chunk=8)  # type: ignore[arg-type]
        if trained:
            (3 * loss).backward()
    for name, t in made.items():
        if name in trained:
            torch.testing.assert_close(t.grad, full[name])
        else:
            assert t.grad is None
    assert ((32, 5) in record.shapes) == ("student_head_VD" in trained)


def test_no_gradient_work_without_grad_mode() -> None:
    made = problem(64, 32)
    wanted = distill_loss(**made, chunk=8)  # type: ignore[arg-type]
    made["student_head_VD"].requires_grad_()
    with LargestTensor() as record, torch.no_grad():
        loss = distill_loss(**made, chunk=8)  # type: ignore[arg-type]
    torch.testing.assert_close(loss, wanted)
    assert (32, 5) not in record.shapes


@pytest.mark.parametrize("loss", DIVERGENCES)
def test_no_tensor_reaches_tokens_by_vocabulary(loss: str) -> None:
    made, options = problem(128, 64), {"loss": loss, "ce_weight": 0.5, "labels_T": labels(128), "student_softcap": 5.0}
    with LargestTensor() as chunked:
        run(made, "chunked", chunk=8, **options)
    with LargestTensor() as reference:
        run(made, "reference", **options)
    # six buffers of one chunk at most, made at once
    assert chunked.numel <= 6 * 8 * 64 < 128 * 64 <= reference.numel


@pytest.mark.parametrize("loss", DIVERGENCES)
def test_float32_is_near_float64(loss: str) -> None:
    options: dict[str, Any] = {"loss": loss, "temperature": 2.0, "ce_weight": 0.5, "labels_T": labels()}
    single = run(problem(dtype=torch.float32), "chunked", **options)
    assert single[0].dtype == torch.float32
    for found, wanted in zip(single, run(problem(), "chunked", **options), strict=True):
        assert (found.double() - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_half_precision_is_computed_in_float32_even_under_autocast() -> None:
    made = problem(dtype=torch.bfloat16)
    wanted = run({name: t.float() for name, t in made.items()}, "chunked")[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(made, "chunked")
    torch.testing.assert_close(found[0], wanted)
    assert found[1].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "reverse"}, "'reverse_kl'"),
        ({"temperature": 0.0}, "must be positive"),
        ({"loss": "jsd", "beta": 1.0}, "between 0 and 1"),
        ({"chunk": 0}, "at least 1"),
        ({"student_softcap": -1.0}, "must be positive"),
        ({"ce_weight": 1.0}, "labels_T"),
        ({"mask_T": torch.ones(21)}, "boolean"),
        ({"teacher_TE": torch.zeros(20, 8)}, "student's tokens"),
        ({"teacher_head_VE": torch.zeros(18, 8)}, "17 rows"),
        ({"student_bias_V": torch.zeros(16)}, "student_bias_V"),
        ({"student_TD": torch.zeros(3, 7, 5)}, "Flatten"),
        ({"backend": "chunkd"}, "'chunked'"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distill_loss(**{**problem(), **change})
