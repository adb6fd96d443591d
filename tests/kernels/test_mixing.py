"""The mixing losses: blocks of rows against both matrices written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ssmorph.kernels.mixing import BACKENDS, LOSSES, mixing_loss
from ssmorph.kernels.mixing.reference import attention_matrix, student_matrix
from ssmorph.kernels.mixing.teacher import Teacher
from tests.kernels.sizes import LargestTensor

HEADS = 4
CPU_BACKENDS = [name for name in ("native", "chunked") if name not in BACKENDS.refusals(torch.device("cpu"))]
NAMES = ("C_BLHN", "B_BLHN", "log_a_BLH", "w_BLH", "D_H")


def problem(
    length: int, *, batch: int = 2, groups: int = 2, decay: float = 0.1, dtype: Any = torch.float64
) -> dict[str, Tensor]:
    """Arguments of mixing_loss; N = 5, K = 6, C and B in `groups` groups, k with 2 heads."""
    torch.manual_seed(length)
    normal = {
        "C_BLHN": (batch, length, groups, 5),
        "B_BLHN": (batch, length, groups, 5),
        "q_BLHK": (batch, length, HEADS, 6),
        "k_BLGK": (batch, length, 2, 6),
        "D_H": (HEADS,),
    }
    made = {name: torch.randn(shape, dtype=torch.float64) for name, shape in normal.items()}
    made["log_a_BLH"] = -torch.rand(batch, length, HEADS, dtype=torch.float64) * decay
    made["w_BLH"] = torch.rand(batch, length, HEADS, dtype=torch.float64)
    return {name: t.to(dtype) for name, t in made.items()}


def run(made: dict[str, Tensor], backend: str, **options: Any) -> list[Tensor]:
    """The loss per head, and the gradient of a weighted sum of it for every student tensor given."""
    made = {name: t.clone().requires_grad_(name in NAMES) for name, t in made.items()}
    loss_H = mixing_loss(**made, scale=0.4, per_head=True, backend=backend, **options)  # type: ignore[arg-type]
    weights_H = torch.arange(1.0, HEADS + 1, dtype=loss_H.dtype)
    student = [made[name] for name in NAMES if name in made]
    return [loss_H, *torch.autograd.grad((loss_H * weights_H).sum(), student)]


def assert_same(made: dict[str, Tensor], **options: Any) -> None:
    wanted = run(made, "reference", **options)
    for backend in CPU_BACKENDS:
        for found, expected in zip(run(made, backend, **options), wanted, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, msg=lambda m, b=backend: f"{b}: {m}")


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("length", [1, 3, 63, 128, 130, 200, 300])
def test_equals_reference(poisoned: None, loss: str, length: int) -> None:
    assert_same(problem(length), loss=loss)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"window": 7, "softcap": 2.0},
        {"window": 100},
        {"softcap": 1.5},
        {"sinks_H": torch.tensor([-1.0, 0.0, 2.0, 8.0], dtype=torch.float64)},
        {"window": 70, "sinks_H": torch.tensor([0.5, 0.0, 2.0, 8.0], dtype=torch.float64)},
    ],
)
def test_teacher_variants(poisoned: None, loss: str, options: dict[str, Any]) -> None:
    assert_same(problem(270), loss=loss, **options)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("left_out", [("D_H",), ("w_BLH",), ("D_H", "w_BLH")])
def test_without_skip_or_weight(poisoned: None, loss: str, left_out: tuple[str, ...]) -> None:
    made = problem(70)
    full = run(made, "chunked", loss=loss)[0]
    for name in left_out:
        del made[name]
    assert_same(made, loss=loss)
    assert not torch.allclose(full, run(made, "chunked", loss=loss)[0])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("decay", [0.0, 1.0, 5.0, 1000.0])
def test_decays_of_any_strength(poisoned: None, loss: str, decay: float) -> None:
    assert_same(problem(300, decay=decay), loss=loss)


@pytest.mark.parametrize("loss", LOSSES)
def test_constant_and_sudden_decays(poisoned: None, loss: str) -> None:
    made = problem(300)
    made["log_a_BLH"] = torch.tensor([0.0, -50.0, -1e-3, -0.5], dtype=torch.float64).expand(2, 300, 4).clone()
    assert_same(made, loss=loss)
    made["log_a_BLH"][:, 100:, 2] = -90.0
    made["log_a_BLH"][:, 101:, 2] = 0.0
    assert_same(made, loss=loss)


def padding(length: int) -> Tensor:
    valid_BL = torch.ones(2, length, dtype=torch.bool)
    valid_BL[0, :170] = False
    valid_BL[1, 20:31] = False
    valid_BL[1, -5:] = False
    return valid_BL


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("window", [None, 40])
def test_padding(poisoned: None, loss: str, window: int | None) -> None:
    assert_same(problem(290), loss=loss, window=window, valid_BL=padding(290))
    nothing_BL = padding(290)
    nothing_BL[0] = False
    assert_same(problem(290), loss=loss, window=window, valid_BL=nothing_BL)


@pytest.mark.parametrize("backend", [*CPU_BACKENDS, "reference"])
@pytest.mark.parametrize("loss", LOSSES)
def test_padded_tokens_have_no_influence(loss: str, backend: str) -> None:
    made, valid_BL = problem(290), padding(290)
    first = run(made, backend, loss=loss, valid_BL=valid_BL)
    for name in ("C_BLHN", "B_BLHN", "log_a_BLH", "w_BLH", "q_BLHK", "k_BLGK"):
        made[name][~valid_BL] = float("nan")
    second = run(made, backend, loss=loss, valid_BL=valid_BL)
    for before, after in zip(first, second, strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0)
    for grad in second[1:5]:
        assert grad[~valid_BL].abs().max() == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_padded_sequence_equals_the_sequence_alone(loss: str) -> None:
    made = problem(90, batch=1)
    alone = run(made, "chunked", loss=loss)
    padded = {n: t if n == "D_H" else torch.cat([torch.ones_like(t[:, :20]), t], 1) for n, t in made.items()}
    valid_BL = torch.arange(110)[None] >= 20
    together = run(padded, "chunked", loss=loss, valid_BL=valid_BL)
    torch.testing.assert_close(together[0], alone[0])
    torch.testing.assert_close(together[1][:, 20:], alone[1])


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_of_the_reference_by_finite_differences(loss: str) -> None:
    made = problem(6, batch=1)
    student = [made[name].requires_grad_() for name in NAMES]

    def function(*tensors: Tensor) -> Tensor:
        changed = {**made, **dict(zip(NAMES, tensors, strict=True))}
        return mixing_loss(**changed, scale=0.4, loss=loss, backend="reference")  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(function, student)


@pytest.mark.parametrize("loss", LOSSES)
def test_rows_of_zeros_have_finite_gradients(poisoned: None, loss: str) -> None:
    made = problem(70)
    del made["D_H"]
    made["C_BLHN"][:, 5:9] = 0
    assert_same(made, loss=loss)


def test_a_student_that_is_the_teacher_costs_nothing() -> None:
    made = problem(1)
    made["C_BLHN"], made["D_H"] = torch.zeros_like(made["C_BLHN"]), torch.ones(HEADS, dtype=torch.float64)
    for loss in LOSSES:
        loss_H, *grads = run(made, "chunked", loss=loss)
        assert loss_H.abs().max() < 1e-12
        assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_float32_is_near_float64(loss: str, backend: str) -> None:
    exact = run(problem(300, decay=2.0), "reference", loss=loss)
    single = run(problem(300, decay=2.0, dtype=torch.float32), backend, loss=loss)
    assert single[0].dtype == torch.float32
    for found, wanted in zip(single, exact, strict=True):
        assert (found.double() - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_half_precision_is_computed_in_float32_even_under_autocast() -> None:
    made = problem(20, dtype=torch.bfloat16)
    wanted = run({name: t.float() for name, t in made.items()}, "chunked")[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(made, "chunked")
    torch.testing.assert_close(found[0], wanted)
    assert found[1].dtype == torch.bfloat16


@pytest.mark.parametrize("loss", LOSSES)
def test_mean_over_heads_is_the_loss(loss: str) -> None:
    made = problem(40)
    scalar = mixing_loss(**made, scale=0.4, loss=loss)  # type: ignore[arg-type]
    torch.testing.assert_close(scalar, run(made, "chunked", loss=loss)[0].mean().detach())


def test_cosine_ignores_the_scale_of_the_student() -> None:
    made = problem(40)
    first = mixing_loss(**made, scale=0.4)  # type: ignore[arg-type]
    scaled = {**made, "w_BLH": 7 * made["w_BLH"], "D_H": 7 * made["D_H"]}
    torch.testing.assert_close(mixing_loss(**scaled, scale=0.4), first)  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", LOSSES)
def test_no_tensor_reaches_length_squared(loss: str) -> None:
    made = problem(1024, batch=1)
    with LargestTensor() as chunked:
        run(made, "chunked", loss=loss, window=300)
        run(made, "chunked", loss=loss)
    assert chunked.numel < 1024 * 1024 / 2
    with LargestTensor() as reference:
        mixing_loss(**made, scale=0.4, loss=loss, backend="reference")  # type: ignore[arg-type]
    assert reference.numel >= 1024 * 1024


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "cosin"}, "'cosine'"),
        ({"window": 0}, "at least 1"),
        ({"softcap": 0.0}, "must be positive"),
        ({"backend": "chunkd"}, "'chunked'"),
        ({"C_BLHN": torch.zeros(2, 8, 3, 5)}, "divide the 4 heads"),
        ({"C_BLHN": torch.zeros(2, 8, 0, 5)}, "divide the 4 heads"),
        ({"B_BLHN": torch.zeros(2, 8, 2, 5, dtype=torch.int64)}, "B_BLHN: must be floating point"),
        ({"log_a_BLH": torch.zeros(8, 4)}, "log_a_BLH"),
        ({"w_BLH": torch.zeros(2, 8, 2)}, "w_BLH"),
        ({"k_BLGK": torch.zeros(2, 9, 2, 6)}, "k_BLGK"),
        ({"B_BLHN": torch.zeros(2, 8, 2, 4)}, "equal widths"),
        ({"D_H": torch.zeros(3)}, "D_H"),
        ({"valid_BL": torch.ones(2, 8)}, "boolean"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixing_loss(**{**problem(8), "scale": 1.0, **change})


def test_random_shapes() -> None:
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    options = st.fixed_dictionaries(
        {
            "loss": st.sampled_from(LOSSES),
            "window": st.none() | st.integers(1, 150),
            "softcap": st.none() | st.floats(0.5, 4.0),
            "sinks_H": st.none() | st.just(torch.linspace(-1.0, 3.0, HEADS, dtype=torch.float64)),
        }
    )

    @hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
    @hypothesis.given(
        st.integers(1, 150), st.integers(1, 3), st.sampled_from([1, 2, 4]), st.sampled_from([0.0, 0.1, 5.0]), options
    )
    def agree(length: int, batch: int, groups: int, decay: float, options: dict[str, Any]) -> None:
        assert_same(problem(length, batch=batch, groups=groups, decay=decay), **options)

    agree()


def test_groups_repeat_as_whole_blocks_of_heads() -> None:
    made = problem(40)
    head_of = {name: torch.tensor([0, 0, 1, 1]) for name in ("C_BLHN", "B_BLHN", "k_BLGK")}
    repeated = {name: t[:, :, head_of[name]] if name in head_of else t for name, t in made.items()}
    torch.testing.assert_close(run(made, "chunked")[0], run(repeated, "chunked")[0], rtol=0, atol=0)


def test_student_matrix_applies_the_recurrence() -> None:
    made = problem(12, groups=HEADS)
    x_BLHP = torch.randn(2, 12, HEADS, 3, dtype=torch.float64)
    M_BHLL = student_matrix(*(made[name] for name in ("C_BLHN", "B_BLHN", "log_a_BLH", "w_BLH", "D_H")))
    state_BHPN = torch.zeros(2, HEADS, 3, 5, dtype=torch.float64)
    for t in range(12):
        write = made["w_BLH"][:, t, :, None, None] * x_BLHP[:, t, :, :, None] * made["B_BLHN"][:, t, :, None, :]
        state_BHPN = made["log_a_BLH"][:, t, :, None, None].exp() * state_BHPN + write
        y_BHP = (state_BHPN * made["C_BLHN"][:, t, :, None]).sum(-1) + made["D_H"][:, None] * x_BLHP[:, t]
        torch.testing.assert_close(torch.einsum("bhs,bshp->bhp", M_BHLL[:, :, t], x_BLHP), y_BHP)


@pytest.mark.parametrize("window", [None, 4])
def test_attention_matrix_applies_attention(window: int | None) -> None:
    q, k, v = torch.randn(3, 2, HEADS, 12, 6, dtype=torch.float64)
    teacher = Teacher(q.transpose(1, 2), k.transpose(1, 2), 0.3, window)
    A_BHLL = attention_matrix(teacher, torch.ones(2, 12, dtype=torch.bool))
    seen_LL = torch.ones(12, 12, dtype=torch.bool).tril()
    if window is not None:
        # the query itself and the three tokens before it
        seen_LL = seen_LL & torch.ones(12, 12, dtype=torch.bool).triu(-3)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen_LL, scale=0.3)
    torch.testing.assert_close(A_BHLL @ v, wanted)
