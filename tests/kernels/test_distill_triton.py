"""The distillation losses by Triton kernels, and by liger-kernel where it is installed."""

from __future__ import annotations

import importlib
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ssmorph.kernels.distill import DIVERGENCES, distill_loss, distill_topk_loss
from ssmorph.kernels.distill.liger import refuses_liger
from ssmorph.kernels.distill.objective import Objective, Side
from tests.kernels.sizes import LargestTensor

from .conftest import DEVICE
from .test_distill import STUDENT, assert_near, kept, labels, problem, run, student_of

pytestmark = pytest.mark.usefixtures("poisoned")

TOKENS, VOCABULARY = 3, 37
# errors as parts of the largest gradient, of which logits' are in that dtype, and of the loss
ROUNDING = {torch.float32: (2e-6, 2e-6), torch.float16: (2e-3, 1e-6), torch.bfloat16: (1.2e-2, 1e-6)}
# it rounds logits too where torch has no matmul from half precision to float32, as on a CPU
LIGER_ROUNDING = {**ROUNDING, torch.float16: (4e-3, 2e-3), torch.bfloat16: (3e-2, 1e-2)}
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"temperature": 1.0, "ce_weight": 0.6, "student_softcap": 3.0, "beta": 0.2},
    {"temperature": 2.0, "ce_weight": 0.6, "student_softcap": 4.0, "student_scale": 0.7, "teacher_scale": 1.3},
]
TABLE = [(torch.float32, OPTIONS[0]), *((dtype, OPTIONS[1]) for dtype in ROUNDING), (torch.float32, OPTIONS[2])]
FLOATING = (*STUDENT, "teacher_TE", "teacher_head_VE", "teacher_bias_V")


@pytest.fixture(autouse=True)
def small_blocks(needs_triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks to a row, the last one not full."""
    triton = importlib.import_module("ssmorph.kernels.distill.triton")
    monkeypatch.setattr(triton, "LAUNCHES", {arch: {2: (16, 16, 1), 4: (16, 16, 1)} for arch in triton.LAUNCHES})


def check(made: dict[str, Tensor], dtype: torch.dtype = torch.float32, backend: str = "triton", **options: Any) -> None:
    """The backend on rounded tensors is the reference in float64 on the same."""
    rounded = {name: t.to(dtype) if name in FLOATING else t for name, t in made.items()}
    wanted = run({name: t.double() if name in FLOATING else t for name, t in rounded.items()}, "reference", **options)
    found = run(rounded, backend, chunk=None if backend == "liger" else 2, **options)
    assert [t.dtype for t in found] == [torch.float32] + [dtype] * (len(found) - 1)
    gradients, loss = (LIGER_ROUNDING if backend == "liger" else ROUNDING)[dtype]
    assert_near(found[1:], wanted[1:], gradients)
    assert_near(found[:1], wanted[:1], loss)


def topk(made: dict[str, Tensor], count: int, temperature: float = 1.0) -> dict[str, Tensor]:
    """Tensors of distill_topk_loss."""
    return {**student_of(made), **kept(made, count, temperature)}


@pytest.mark.parametrize("loss", DIVERGENCES)
@pytest.mark.parametrize(("dtype", "options"), TABLE)
def test_heads(loss: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    made = problem(TOKENS, VOCABULARY, bias="student_scale" in options)
    check(made, dtype, loss=loss, labels_T=labels(TOKENS, VOCABULARY), **options)


@pytest.mark.parametrize("count", [1, 36, VOCABULARY])
@pytest.mark.parametrize(("dtype", "options"), TABLE)
def test_buckets(count: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    made = topk(problem(TOKENS, VOCABULARY, bias="student_scale" in options), count, options["temperature"])
    options = {name: value for name, value in options.items() if not name.startswith(("teacher", "beta"))}
    check(made, dtype, labels_T=labels(TOKENS, VOCABULARY), **options)


@pytest.mark.parametrize("loss", DIVERGENCES)
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 1), (1, 17), (2, 1000), (9, 33), (0, 17)])
def test_sizes(loss: str, tokens: int, vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    check(problem(tokens, vocabulary), loss=loss)
    if tokens and loss == "kl":
        check(topk(problem(tokens, vocabulary), min(7, vocabulary)))


def test_random_sizes() -> None:
    hypothesis = pytest.importorskip("hypothesis")
    sizes = hypothesis.strategies.integers

    @hypothesis.settings(max_examples=5, deadline=None, derandomize=True)
    @hypothesis.given(sizes(1, 5), sizes(1, 70), sizes(1, 70), hypothesis.strategies.sampled_from(DIVERGENCES))
    def same(tokens: int, vocabulary: int, count: int, loss: str) -> None:
        check(problem(tokens, vocabulary), loss=loss, temperature=2.0)
        check(topk(problem(tokens, vocabulary), min(count, vocabulary), 2.0), temperature=2.0)

    same()


@pytest.mark.parametrize("loss", DIVERGENCES)
def test_impossible_tokens_give_no_nan(loss: str) -> None:
    made = problem(TOKENS, VOCABULARY)
    made["teacher_bias_V"][3:6] = -math.inf
    check(made, loss=loss)
    made["student_bias_V"][3:5] = -math.inf
    check(made, loss=loss, temperature=2.0)
    if loss == "kl":
        made["student_bias_V"][5] = -math.inf
        # the last of them with nothing left for the tail
        for count in (30, 34, 36):
            check(topk(made, count))


@pytest.mark.parametrize("count", [None, 5])
def test_masked_tokens_do_not_count(count: int | None) -> None:
    made = problem(5, VOCABULARY) if count is None else topk(problem(5, VOCABULARY), count)
    mask_T = torch.arange(5, device=DEVICE) % 3 > 0
    check(made, mask_T=mask_T, ce_weight=0.3, labels_T=labels(5, VOCABULARY))
    single = {name: t.float() if t.is_floating_point() else t for name, t in made.items()}
    assert run(single, "triton", mask_T=mask_T)[1][~mask_T].abs().max() == 0
    for t in run(single, "triton", mask_T=torch.zeros_like(mask_T), ce_weight=1.0, labels_T=labels(5, VOCABULARY)):
        assert t.abs().max() == 0


@pytest.mark.parametrize("made", [problem(4, VOCABULARY), topk(problem(4, VOCABULARY), 5)], ids=["heads", "buckets"])
def test_twice_the_same_and_only_what_is_trained(made: dict[str, Tensor]) -> None:
    single = {name: t.float() if t.is_floating_point() else t for name, t in made.items()}
    first, second = (run(single, "triton", chunk=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    function: Any = distill_topk_loss if "indices_TK" in made else distill_loss
    single["student_TD"].requires_grad_()
    with LargestTensor() as record:
        function(**single, chunk=3, backend="triton").backward()
    torch.testing.assert_close(3 * single["student_TD"].grad, first[1])
    assert (VOCABULARY, 5) not in record.shapes
    with torch.no_grad():
        assert torch.equal(function(**single, chunk=3, backend="triton"), first[0])


def test_mixed_dtypes_and_views() -> None:
    made = problem(4, VOCABULARY)
    made["student_TD"] = made["student_TD"].float().t().contiguous().t()
    made["student_head_VD"] = made["student_head_VD"].to(torch.bfloat16)
    made["student_bias_V"] = made["student_bias_V"].half()[:, None].expand(-1, 2)[:, 0]
    made |= {name: made[name].float() for name in ("teacher_TE", "teacher_head_VE", "teacher_bias_V")}
    wanted = run({name: t.double() for name, t in made.items()}, "reference")
    found = run(made, "triton", chunk=3)
    assert_near(found[:2], wanted[:2], 2e-6)
    assert_near(found[2:], wanted[2:], 2 * torch.finfo(torch.bfloat16).eps)


class Guarded:
    """A tensor with a wall of NaN (or a number that cannot be meant) on either side."""

    def __init__(self, inner: Tensor, wall: float) -> None:
        self.whole = torch.full((inner.numel() + 64,), wall, dtype=inner.dtype, device=DEVICE)
        self.inner = self.whole[32:-32].view(inner.shape)
        self.inner.copy_(inner)
        self.walls = self.whole[:32].clone(), self.whole[-32:].clone()

    def unharmed(self) -> bool:
        return all(
            torch.equal(found.nan_to_num(7e7), wall.nan_to_num(7e7))
            for found, wall in zip((self.whole[:32], self.whole[-32:]), self.walls, strict=True)
        )


def test_nothing_is_read_or_written_past_the_ends() -> None:
    kernels = importlib.import_module("ssmorph.kernels.distill.triton_kernels")
    rows, vocabulary, known = 3, 19, 5
    nan = math.nan

    def made(*shape: int) -> Guarded:
        return Guarded(torch.randn(shape), nan)

    numbers = (2.0, 0.5, 0.7, 1.0, 4.0, 3.0)
    flags = {"Q_BIAS": True, "Q_CAPPED": True, "P_BIAS": True, "P_CAPPED": True, "LABELS": True, "GRADS": True}
    for loss in DIVERGENCES:
        labels_T, share = Guarded(torch.tensor([0, -100, 18]), 10**6), made(1)
        logits = [made(rows, vocabulary), made(rows, vocabulary), made(rows, vocabulary)]
        walled = [*logits, made(vocabulary), made(vocabulary), labels_T, share]
        walled.append(Guarded(torch.full((rows,), nan), nan))
        kernels.heads_kernel[(rows,)](
            *(t.inner for t in walled), *[vocabulary] * 4, *numbers, LOSS=loss, **flags, BLOCK=16
        )
        assert all(t.unharmed() and t.inner.isfinite().all() for t in walled)
    indices = Guarded(torch.stack([torch.randperm(vocabulary)[:known] for _ in range(rows)]), 10**6)
    log_probs = Guarded(torch.full((rows, known), 0.1).log(), nan)
    tail, losses = Guarded(torch.full((rows,), 0.5).log(), nan), Guarded(torch.full((rows,), nan), nan)
    walled = [made(rows, vocabulary), made(vocabulary), indices, log_probs, tail, labels_T, share, losses]
    flags = {"BIAS": True, "CAPPED": True, "LABELS": True, "GRADS": True}
    kernels.buckets_kernel[(rows,)](
        walled[0].inner,
        *(t.inner for t in walled),
        *[vocabulary] * 3,
        known,
        2.0,
        0.7,
        4.0,
        **flags,
        KNOWN=16,
        BLOCK=16,
    )
    assert all(t.unharmed() and t.inner.isfinite().all() for t in walled)


def test_left_out_the_chunk_takes_no_more_than_the_heads_do(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = importlib.import_module("ssmorph.kernels.distill.triton")
    assert triton.row_limit(49152, 576, 2, 2) == 2184
    assert triton.row_limit(128256, 4096, 2, 2) == 1638
    monkeypatch.setattr(triton, "BUDGET", 0)
    monkeypatch.setattr(triton, "ROWS", 4)
    single = {name: t.float() for name, t in problem(17, VOCABULARY).items()}
    with LargestTensor() as record:
        run(single, "triton")
    # 2 x 5 x 4 bytes of heads for 2 x 4 of buffers, for each token of the vocabulary: 5 rows, so four chunks of 17,
    # rounded up to 8; rows are of 48 elements
    assert (8, 48) in record.shapes


def test_every_shipped_kernel_is_listed() -> None:
    triton = importlib.import_module("ssmorph.kernels.distill.triton")
    for arch, dtype in itertools.product(triton.LAUNCHES, ("bf16", "fp16", "fp32")):
        listed = triton.shipped(arch, dtype)
        assert len({s.name for s in listed}) == len(listed) == 10
        assert all(s.arguments["grads_ptr"] == f"*{dtype}" and s.arguments["student_ptr"] == "*fp32" for s in listed)


def test_what_triton_cannot_do_is_refused() -> None:
    made = problem(TOKENS, 5000)
    with pytest.raises(ValueError, match="float32"):
        run(made, "triton")
    with pytest.raises(ValueError, match="float32"):
        run(topk(made, 3), "triton")
    single = {name: t.float() if name in FLOATING else t for name, t in topk(made, 4097).items()}
    with pytest.raises(ValueError, match="4096"):
        run(single, "triton")


@pytest.fixture
def needs_liger() -> None:
    """Skips by name where the package is missing or does not run."""
    reason = refuses_liger(DEVICE)
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("loss", DIVERGENCES)
def test_liger_is_equal(needs_liger: None, loss: str, dtype: torch.dtype) -> None:
    made = problem(5, VOCABULARY, bias=False)
    check(made, dtype, "liger", loss=loss, temperature=2.0, beta=0.3)
    check(made, dtype, "liger", loss=loss, mask_T=torch.arange(5, device=DEVICE) % 3 > 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ce_weight": 1.0, "labels_T": labels(5, VOCABULARY)}, "ce_weight"),
        ({"student_softcap": 3.0}, "soft cap"),
        ({"teacher_scale": 3.0}, "scale"),
        ({"chunk": 3}, "chunk"),
        ({"teacher_bias_V": torch.zeros(VOCABULARY)}, "bias"),
        ({}, "float64"),
    ],
)
def test_what_liger_cannot_do_is_refused(change: dict[str, Any], message: str) -> None:
    made, liger = problem(5, VOCABULARY, bias=False), importlib.import_module("ssmorph.kernels.distill.liger")
    student = Side(made["student_TD"], made["student_head_VD"], None, 1.0, change.get("student_softcap"))
    bias, scale = change.get("teacher_bias_V"), change.get("teacher_scale", 1.0)
    teacher = Side(made["teacher_TE"], made["teacher_head_VE"], bias, scale, None)
    with pytest.raises(ValueError, match=message):
        liger.distill_liger(
            student, teacher, change.get("labels_T"), Objective("kl", 1.0, 0.5, 1.0, change.get("chunk"))
        )
