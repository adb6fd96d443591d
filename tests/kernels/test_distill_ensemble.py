"""Several teachers: the weighted mean of their logits as the target, and its likeliest tokens."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssmorph.kernels.distill import DIVERGENCES, Side, distill_ensemble_loss, distill_topk_loss, topk_of
from tests.kernels.sizes import LargestTensor

from .conftest import DEVICE
from .test_distill import assert_near, labels

WEIGHTS = (1.0, 3.0)


def side(width: int, seed: int, *, tokens: int = 21, vocabulary: int = 17, **options: Any) -> Side:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)

    bias = drawn(vocabulary) if options.pop("bias", False) else None
    return Side(drawn(tokens, width), drawn(vocabulary, width), bias, options.get("scale", 1.0), options.get("softcap"))


def sides(**sizes: int) -> tuple[Side, list[Side]]:
    """A student, and teachers of other widths with ends of their own."""
    student = side(5, 0, bias=True, softcap=4.0, **sizes)
    return student, [side(8, 1, softcap=2.0, scale=0.5, **sizes), side(3, 2, bias=True, **sizes)]


def logits(one: Side) -> Tensor:
    """By the formula."""
    z_TV = one.scale * F.linear(one.hidden_TD, one.head_VD, one.bias_V)
    return z_TV if one.softcap is None else one.softcap * torch.tanh(z_TV / one.softcap)


def run(student: Side, teachers: list[Side], **options: Any) -> list[Tensor]:
    """The loss and the gradients of the student's hidden states and head."""
    hidden, head = (t.clone().requires_grad_() for t in (student.hidden_TD, student.head_VD))
    student = replace(student, hidden_TD=hidden, head_VD=head)
    weights = options.pop("weights", WEIGHTS)
    loss = distill_ensemble_loss(student, teachers, weights, **options)
    return [loss, *torch.autograd.grad(loss, [hidden, head])]


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_the_target_is_the_weighted_mean_of_logits(poisoned: None, backend: str) -> None:
    student, teachers = sides()
    mean_TV = 0.25 * logits(teachers[0]) + 0.75 * logits(teachers[1])
    logs = [(t / 2).log_softmax(-1) for t in (logits(student), mean_TV)]
    expected = 4 * F.kl_div(*logs, log_target=True, reduction="batchmean")
    torch.testing.assert_close(run(student, teachers, temperature=2.0, backend=backend)[0], expected)


@pytest.mark.parametrize("loss", DIVERGENCES)
@pytest.mark.parametrize("chunk", [1, 8, None])
def test_chunked_equals_reference(poisoned: None, loss: str, chunk: int | None) -> None:
    options: dict[str, Any] = {"loss": loss, "ce_weight": 0.4, "labels_T": labels(), "temperature": 0.7}
    options["mask_T"] = torch.arange(21, device=DEVICE) % 3 > 0
    found = run(*sides(), backend="chunked", chunk=chunk, **options)
    for ours, wanted in zip(found, run(*sides(), backend="reference", **options), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("loss", DIVERGENCES)
def test_triton_equals_reference(poisoned: None, loss: str) -> None:
    made = sides(tokens=3, vocabulary=37)
    wanted = run(*made, loss=loss, backend="reference")
    student, *teachers = (
        replace(
            one, hidden_TD=one.hidden_TD.float(), head_VD=one.head_VD.float(),
            bias_V=None if one.bias_V is None else one.bias_V.float(),
        )
        for one in (made[0], *made[1])
    )  # fmt: skip
    assert_near(run(student, teachers, loss=loss, backend="triton", chunk=2), wanted, 2e-6)


def test_one_teacher_and_equal_teachers_are_that_teacher() -> None:
    student, teachers = sides()
    alone = run(student, teachers[:1], weights=(0.3,))
    for ours, wanted in zip(run(student, [teachers[0]] * 3, weights=(1, 2, 5)), alone, strict=True):
        torch.testing.assert_close(ours, wanted)


def test_what_one_teacher_rules_out_is_ruled_out() -> None:
    student, teachers = sides()
    bias = torch.zeros(17, device=DEVICE, dtype=torch.float64)
    bias[3:6] = -math.inf
    teachers[0] = replace(teachers[0], bias_V=bias, softcap=None)
    for loss in DIVERGENCES:
        assert all(t.isfinite().all() for t in run(student, teachers, loss=loss))
    indices_TK, log_probs_TK, _ = topk_of(teachers, WEIGHTS, 14)
    assert not ((indices_TK >= 3) & (indices_TK < 6)).any()
    torch.testing.assert_close(log_probs_TK.exp().sum(-1), torch.ones(21, device=DEVICE, dtype=torch.float64))


def test_no_tensor_is_larger_than_a_chunks_buffers() -> None:
    student, teachers = sides(tokens=128, vocabulary=64)
    with LargestTensor() as record, torch.no_grad():
        distill_ensemble_loss(student, [*teachers, *teachers], (1, 1, 1, 1), chunk=12, backend="chunked")
        topk_of(teachers, WEIGHTS, 4, chunk=12)
    # chunks of 12 tokens; three buffers serve four teachers
    assert record.numel == 3 * 12 * 64


@pytest.mark.parametrize("chunk", [4, None])
@pytest.mark.parametrize("count", [1, 6, 17])
def test_the_likeliest_tokens_and_the_rest(poisoned: None, count: int, chunk: int | None) -> None:
    _, teachers = sides()
    mean_TV = (0.25 * logits(teachers[0]) + 0.75 * logits(teachers[1])) / 3
    expected = mean_TV.log_softmax(-1).topk(count)
    indices_TK, log_probs_TK, log_rest_T = topk_of(teachers, WEIGHTS, count, temperature=3.0, chunk=chunk)
    assert torch.equal(indices_TK, expected.indices)
    torch.testing.assert_close(log_probs_TK, expected.values)
    torch.testing.assert_close(log_rest_T.exp(), 1 - expected.values.exp().sum(-1), atol=1e-12, rtol=1e-9)
    assert (log_rest_T == -math.inf).all() == (count == 17)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_a_given_rest_outlives_the_rounding_of_what_is_kept(backend: str) -> None:
    student, teachers = sides()
    indices_TK, log_probs_TK, log_rest_T = topk_of(teachers, WEIGHTS, 5)

    def loss(kept_TK: Tensor, rest_T: Tensor | None) -> float:
        s = student
        return distill_topk_loss(s.hidden_TD, s.head_VD, indices_TK, kept_TK, log_rest_T=rest_T, backend=backend,
                                 student_bias_V=s.bias_V, student_softcap=s.softcap).item()  # fmt: skip

    exact = loss(log_probs_TK, None)
    assert loss(log_probs_TK, log_rest_T) == pytest.approx(exact, rel=1e-9)
    # all too likely by the same factor is no error at all once the rest is known
    assert loss(log_probs_TK - 0.01, log_rest_T) == pytest.approx(exact, rel=1e-9)
    assert abs(loss(log_probs_TK - 0.01, None) - exact) > 1e-4


@pytest.mark.parametrize(
    ("weights", "count", "message"),
    [((1.0,), 3, "a weight each"), ((1.0, 0.0), 3, "must be positive"), (WEIGHTS, 18, r"1\.\.17"), ((), 1, "one or")],
)
def test_errors_name_the_argument(weights: tuple[float, ...], count: int, message: str) -> None:
    teachers = sides()[1] if weights else []
    with pytest.raises(ValueError, match=message):
        topk_of(teachers, weights, count)


def test_teachers_of_other_vocabularies_are_refused() -> None:
    student, teachers = sides()
    teachers[1] = side(3, 2, vocabulary=18)
    with pytest.raises(ValueError, match="must have 17 rows; got 18"):
        run(student, teachers)
