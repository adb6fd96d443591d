"""The distillation loss against the teacher's K likeliest tokens and a bucket for the rest."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ssmorph.kernels.distill import chunked, distill_topk_loss
from tests.kernels.sizes import LargestTensor

from .conftest import DEVICE
from .test_distill import STUDENT, assert_near, assert_same, kept, labels, problem, run, student_of, teacher_log_probs

BACKENDS = ["chunked", "reference"]


def topk(made: dict[str, Tensor], count: int, temperature: float = 1.0) -> dict[str, Tensor]:
    """Tensors of distill_topk_loss."""
    return {**student_of(made), **kept(made, count, temperature)}


@pytest.mark.parametrize("count", [1, 5, 16, 17])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("ce_weight", [0.0, 0.7])
def test_chunked_equals_reference(poisoned: None, count: int, temperature: float, ce_weight: float) -> None:
    options: dict[str, Any] = {"ce_weight": ce_weight, "labels_T": labels(), "temperature": temperature}
    assert_same(topk(problem(), count, temperature), **options)
    assert_same(topk(problem(bias=False), count, temperature), student_softcap=2.0, student_scale=0.6, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_with_every_token_kept_it_is_the_forward_kl(backend: str, temperature: float) -> None:
    made = problem()
    options: dict[str, Any] = {"temperature": temperature, "ce_weight": 0.4, "labels_T": labels()}
    found = run(topk(made, 17, temperature), backend, **options)
    for ours, wanted in zip(found, run(made, "reference", **options), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_buckets_by_hand(backend: str) -> None:
    made, count = problem(3), 4
    both = topk(made, count)
    student_TV = (made["student_TD"] @ made["student_head_VD"].t() + made["student_bias_V"]).softmax(-1)
    wanted = 0.0
    for q_V, p_V, indices_K in zip(student_TV, teacher_log_probs(made).exp(), both["indices_TK"].tolist(), strict=True):
        rest = [v for v in range(17) if v not in indices_K]
        pairs = [(p_V[v], q_V[v]) for v in indices_K] + [(p_V[rest].sum(), q_V[rest].sum())]
        wanted += sum(float(p * (p / q).log()) for p, q in pairs) / 3
    assert run(both, backend)[0].item() == pytest.approx(wanted, rel=1e-10)


def test_fewer_tokens_never_cost_more() -> None:
    made = problem()
    losses = [run(topk(made, count), "chunked")[0].item() for count in range(1, 17)]
    assert losses == sorted(losses)
    assert losses[0] > 0


@pytest.mark.parametrize("chunk", [1, 7, 21, 100, None])
def test_any_chunk_any_cache(poisoned: None, chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CACHED", 3 * 17 * 8)
    assert_same(topk(problem(bias=False), 5), chunk=chunk)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_tokens_do_not_count(poisoned: None, backend: str) -> None:
    mask_T = torch.arange(21, device=DEVICE) % 3 > 0
    both, options = topk(problem(), 5), {"ce_weight": 0.3}
    masked = run(both, backend, mask_T=mask_T, labels_T=labels(), **options)
    few = {n: t[mask_T] if n in ("student_TD", "indices_TK", "log_probs_TK") else t for n, t in both.items()}
    torch.testing.assert_close(masked[0], run(few, backend, labels_T=labels()[mask_T], **options)[0])
    assert masked[1][~mask_T].abs().max() == 0
    for t in run(both, backend, mask_T=torch.zeros_like(mask_T), labels_T=labels(), **options):
        assert t.abs().max() == 0


@pytest.mark.parametrize("count", [14, 15, 17])
def test_impossible_tokens_give_no_nan(poisoned: None, count: int) -> None:
    made = problem()
    made["teacher_bias_V"][3:6] = -math.inf
    assert_same(topk(made, count))
    made["student_bias_V"][3:6] = -math.inf
    found = assert_same(topk(made, count))
    # 14 tokens are all there is, so nothing is lost
    assert found[0].item() == pytest.approx(run(made, "reference")[0].item(), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [5, 16, 17])
def test_rounded_log_probabilities_are_a_distribution(dtype: torch.dtype, count: int) -> None:
    made = problem(bias=False)
    both = topk(made, count)
    # rows that know all but a little sum to more than 1
    both["log_probs_TK"] = (both["log_probs_TK"] + 0.01).to(dtype)
    student = {name: t.to(torch.float32) for name, t in both.items() if name in STUDENT}
    wanted = run({**both, **student, "log_probs_TK": both["log_probs_TK"].double()}, "reference")
    assert_near(run({**both, **student}, "chunked", chunk=8), [t.double() for t in wanted], 1e-5)
    assert wanted[0] >= 0


def test_a_student_that_is_the_teacher_costs_nothing() -> None:
    made = problem(bias=False)
    made["student_TD"], made["student_head_VD"] = made["teacher_TE"], made["teacher_head_VE"]
    for count in (1, 9, 17):
        for t in run(topk(made, count, 2.0), "chunked", temperature=2.0):
            assert t.abs().max() < 1e-12


def test_gradients_of_the_reference_by_finite_differences() -> None:
    both = topk(problem(3, 6), 3, 2.0)

    def function(*tensors: Tensor) -> Tensor:
        changed = {**both, **dict(zip(STUDENT, tensors, strict=True))}
        options: dict[str, Any] = {"ce_weight": 0.5, "labels_T": torch.tensor([1, -100, 3], device=DEVICE)}
        return distill_topk_loss(**changed, temperature=2.0, backend="reference", student_softcap=2.0, **options)  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(function, [both[name].requires_grad_() for name in STUDENT])


def test_a_frozen_head_gets_no_gradient_and_one_buffer_is_the_largest_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CACHED", 64 * 8)
    both = topk(problem(128, 64), 4)
    both["student_TD"].requires_grad_()
    with LargestTensor() as record:
        distill_topk_loss(**both, chunk=12, backend="chunked").backward()  # type: ignore[arg-type]
    # 11 chunks of 12 tokens; hidden states are smaller
    assert record.numel == 12 * 64
    assert (64, 5) not in record.shapes


def test_random_sizes() -> None:
    hypothesis = pytest.importorskip("hypothesis")
    sizes = hypothesis.strategies.integers

    @hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
    @hypothesis.given(sizes(1, 30), sizes(1, 70), sizes(1, 70), sizes(1, 40))
    def same(tokens: int, vocabulary: int, count: int, chunk: int) -> None:
        assert_same(topk(problem(tokens, vocabulary), min(count, vocabulary), 2.0), chunk=chunk, temperature=2.0)

    same()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices_TK": torch.zeros(21, 5, dtype=torch.int64)}, "twice"),
        ({"indices_TK": torch.arange(13, 18).expand(21, 5)}, "0..16"),
        ({"indices_TK": torch.arange(-1, 4).expand(21, 5)}, "0..16"),
        ({"indices_TK": torch.zeros(21, 4, dtype=torch.int64)}, "log_probs_TK"),
        ({"indices_TK": torch.zeros(20, 5, dtype=torch.int64)}, "indices_TK"),
        ({"indices_TK": torch.zeros(21, 5)}, "integers"),
        ({"log_probs_TK": torch.ones(21, 5)}, "not logits"),
        ({"log_probs_TK": torch.full((21, 5), math.nan)}, "not logits"),
        ({"temperature": 0.0}, "must be positive"),
        ({"chunk": 0}, "at least 1"),
        ({"ce_weight": 1.0}, "labels_T"),
        ({"mask_T": torch.ones(21)}, "boolean"),
        ({"student_bias_V": torch.zeros(16)}, "student_bias_V"),
        ({"backend": "liger"}, "'chunked'|Known names"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distill_topk_loss(**{**topk(problem(), 5), **change})
