"""The distillation losses: chunks of tokens against all logits written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ssmorph.kernels.distill import DIVERGENCES, chunked, distill_loss, distill_topk_loss
from tests.kernels.sizes import LargestTensor

from .conftest import DEVICE

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
    return {name: torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype) for name, shape in shapes.items()}


def student_of(made: dict[str, Tensor]) -> dict[str, Tensor]:
    """What distill_topk_loss takes of it."""
    return {name: t for name, t in made.items() if name in STUDENT}


def teacher_log_probs(made: dict[str, Tensor], temperature: float = 1.0) -> Tensor:
    """[tokens, vocabulary] in float64."""
    logits_TV = made["teacher_TE"].double() @ made["teacher_head_VE"].double().t()
    if "teacher_bias_V" in made:
        logits_TV = logits_TV + made["teacher_bias_V"].double()
    return (logits_TV / temperature).log_softmax(-1)


def kept(made: dict[str, Tensor], count: int, temperature: float = 1.0) -> dict[str, Tensor]:
    """The teacher's `count` likeliest tokens, the unlikeliest of them first."""
    log_probs_TK, indices_TK = teacher_log_probs(made, temperature).topk(count, sorted=True)
    return {"indices_TK": indices_TK.flip(-1), "log_probs_TK": log_probs_TK.flip(-1)}


def labels(tokens: int = 21, vocabulary: int = 17) -> Tensor:
    """Every fourth one missing."""
    labels_T = torch.arange(tokens, device=DEVICE) % vocabulary
    labels_T[::4] = -100
    return labels_T


def run(made: dict[str, Tensor], backend: str, **options: Any) -> list[Tensor]:
    """The loss, over buckets where indices are given, and its gradients for the student's tensors given."""
    made = {name: t.clone().requires_grad_(name in STUDENT) for name, t in made.items()}
    function: Any = distill_topk_loss if "indices_TK" in made else distill_loss
    loss = function(**made, backend=backend, **options)
    return [loss, *torch.autograd.grad(3 * loss, [made[name] for name in STUDENT if name in made])]


def assert_same(made: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """chunked is the reference; returns what it found."""
    found = run(made, "chunked", **{"chunk": 8, **options})
    for ours, wanted in zip(found, run(made, "reference", **options), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10)
        assert ours.isfinite().all()
    return found


def assert_near(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    """Each within a part of the largest number wanted."""
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.isfinite().all()
        largest = theirs.abs().max().clamp(min=1e-3) if theirs.numel() else 0
        assert ((ours.double() - theirs).abs() <= tolerance * largest).all()


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
    mask_T = torch.arange(21, device=DEVICE) % 3 > 0
    made, options = problem(), {"loss": loss, "temperature": 2.0, "ce_weight": 0.3}
    masked = assert_same(made, mask_T=mask_T, labels_T=labels(), **options)
    kept = {n: t[mask_T] if n in ("student_TD", "teacher_TE") else t for n, t in made.items()}
    alone = run(kept, "chunked", labels_T=labels()[mask_T], **options)
    torch.testing.assert_close(masked[0], alone[0])
    assert masked[1][~mask_T].abs().max() == 0


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_nothing_to_count_is_zero(backend: str) -> None:
    options: dict[str, Any] = {
        "ce_weight": 1.0,
        "labels_T": labels(),
        "mask_T": torch.zeros(21, dtype=torch.bool, device=DEVICE),
    }
    for t in run(problem(), backend, **options):
        assert t.abs().max() == 0
    unlabelled = run(problem(), backend, ce_weight=1.0, labels_T=torch.full((21,), -100, device=DEVICE))
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
    half, third = (torch.tensor([t], device=DEVICE).log() for t in ([0.5, 0.5], [0.25, 0.75]))
    eye = torch.eye(2, device=DEVICE)
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
        options: dict[str, Any] = {
            "temperature": 2.0,
            "ce_weight": 0.5,
            "labels_T": torch.tensor([1, -100, 3], device=DEVICE),
        }
        return distill_loss(**changed, loss=loss, backend="reference", student_softcap=2.0, **options)  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(function, [made[name].requires_grad_() for name in STUDENT])


@pytest.mark.parametrize("trained", [("student_TD",), ("student_head_VD",), ("student_bias_V",), ()])
def test_only_what_is_trained_gets_a_gradient(trained: tuple[str, ...]) -> None:
    made = problem(64, 32)
    full = dict(zip(STUDENT, run(made, "chunked", chunk=8)[1:], strict=True))
    for name in trained:
        made[name].requires_grad_()
    with LargestTensor() as record:
        loss = distill_loss(**made, chunk=8, backend="chunked")  # type: ignore[arg-type]
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
    wanted = distill_loss(**made, chunk=8, backend="chunked")  # type: ignore[arg-type]
    made["student_head_VD"].requires_grad_()
    with LargestTensor() as record, torch.no_grad():
        loss = distill_loss(**made, chunk=8, backend="chunked")  # type: ignore[arg-type]
    torch.testing.assert_close(loss, wanted)
    assert (32, 5) not in record.shapes


@pytest.mark.parametrize("loss", DIVERGENCES)
def test_two_buffers_of_one_chunk_are_the_largest_tensors(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, options = problem(128, 64), {"loss": loss, "ce_weight": 0.5, "labels_T": labels(128), "student_softcap": 5.0}
    monkeypatch.setattr(chunked, "CACHED", 64 * 8)  # one row
    with LargestTensor() as ours:
        run(made, "chunked", chunk=8, **options)
    with LargestTensor() as reference:
        run(made, "reference", **options)
    assert ours.numel == 2 * 8 * 64 < 128 * 64 <= reference.numel


def test_left_out_the_chunk_keeps_to_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    made = problem(128, 64)
    wanted = run(made, "chunked", chunk=128)
    monkeypatch.setattr(chunked, "BUDGET", 2 * 50 * 64 * 8)
    monkeypatch.setattr(chunked, "CACHED", 64 * 8)
    with LargestTensor() as record:
        found = run(made, "chunked")
    # three equal chunks, not two of 50 tokens and one of 28
    assert record.numel == 2 * 43 * 64
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("loss", DIVERGENCES)
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 1), (1, 1000), (5, 1), (0, 17), (33, 1000)])
def test_sizes(poisoned: None, loss: str, tokens: int, vocabulary: int) -> None:
    assert_same(problem(tokens, vocabulary), loss=loss)


def test_random_sizes() -> None:
    hypothesis = pytest.importorskip("hypothesis")
    sizes = hypothesis.strategies.integers

    @hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
    @hypothesis.given(
        sizes(1, 40), sizes(1, 70), sizes(1, 50), sizes(1, 4), hypothesis.strategies.sampled_from(DIVERGENCES)
    )
    def same(tokens: int, vocabulary: int, chunk: int, cached: int, loss: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chunked, "CACHED", cached * vocabulary * 8)
            options = {"labels_T": labels(tokens, vocabulary), "ce_weight": 0.3, "student_softcap": 4.0}
            assert_same(problem(tokens, vocabulary), loss=loss, chunk=chunk, temperature=2.0, **options)

    same()


@pytest.mark.parametrize("loss", DIVERGENCES)
def test_twice_the_same(loss: str) -> None:
    made = problem(50, 300, dtype=torch.float32)
    first, second = (run(made, "chunked", loss=loss, chunk=16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_loses_only_the_rounding_of_gradients(dtype: torch.dtype) -> None:
    made = problem(dtype=dtype)
    wanted = run({name: t.double() for name, t in made.items()}, "reference", loss="jsd")
    found = run(made, "chunked", loss="jsd", chunk=8)
    assert_near(found[:1], wanted[:1], 1e-6)
    assert_near(found, wanted, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("loss", DIVERGENCES)
def test_float32_is_near_float64(loss: str) -> None:
    options: dict[str, Any] = {"loss": loss, "temperature": 2.0, "ce_weight": 0.5, "labels_T": labels()}
    single = run(problem(dtype=torch.float32), "chunked", **options)
    assert single[0].dtype == torch.float32
    for found, wanted in zip(single, run(problem(), "chunked", **options), strict=True):
        assert (found.double() - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_half_precision_is_computed_in_float32_even_under_autocast() -> None:
    made = problem(dtype=torch.bfloat16)
    wanted = run({name: t.float() for name, t in made.items()}, "chunked")[0]
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
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
        ({"ce_weight": 1.0, "labels_T": torch.full((21,), 17)}, "0..16"),
        ({"ce_weight": 1.0, "labels_T": torch.full((21,), -1)}, "0..16"),
        ({"mask_T": torch.ones(21)}, "boolean"),
        ({"teacher_TE": torch.zeros(20, 8)}, "student's tokens"),
        ({"teacher_head_VE": torch.zeros(18, 8)}, "17 rows"),
        ({"student_bias_V": torch.zeros(16)}, "student_bias_V"),
        ({"student_TD": torch.zeros(3, 7, 5)}, "Flatten"),
        ({"teacher_TE": torch.zeros(21, 8, dtype=torch.int64)}, "teacher: must be floating point"),
        ({"labels_T": torch.zeros(21)}, "labels_T: must be integers"),
        ({"backend": "chunkd"}, "'chunked'"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distill_loss(**{**problem(), **change})
