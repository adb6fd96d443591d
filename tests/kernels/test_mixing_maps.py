"""The maps of both matrices: blocks of rows against the matrices written out and averaged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ssmorph.kernels.mixing import mixing_maps
from ssmorph.kernels.mixing.reference import attention_matrix, student_matrix
from ssmorph.kernels.mixing.teacher import Teacher
from tests.kernels.sizes import LargestTensor
from tests.kernels.test_mixing import HEADS, problem

SCALE = 0.4
SINKS_H = torch.tensor([0.5, 0.0, 2.0, 8.0], dtype=torch.float64)


def matrices(made: dict[str, Tensor], valid_BL: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """M and A [B, H, L, L], padded tokens neither decaying nor writing."""
    made = {n: t.repeat_interleave(HEADS // t.shape[2], 2) if t.ndim == 4 else t for n, t in made.items()}
    hide = ~valid_BL[..., None]
    log_a, w = (made[name].masked_fill(hide, 0) for name in ("log_a_BLH", "w_BLH"))
    M_BHLL = student_matrix(made["C_BLHN"], made["B_BLHN"], log_a, w, made["D_H"])
    return M_BHLL, attention_matrix(Teacher(made["q_BLHK"], made["k_BLGK"], SCALE, **options), valid_BL)


def averaged(X_BHLL: Tensor, valid_BL: Tensor, cells: int) -> Tensor:
    """Cell by cell, from the definition."""
    length = valid_BL.shape[1]
    cell_L = torch.tensor([p * cells // length for p in range(length)])
    seen_BLL = (valid_BL[:, :, None] & valid_BL[:, None, :]).tril()
    out = X_BHLL.new_full((X_BHLL.shape[1], cells, cells), float("nan"))
    for i in range(cells):
        for j in range(cells):
            pairs_BLL = seen_BLL & (cell_L == i)[:, None] & (cell_L == j)
            if pairs_BLL.any():
                out[:, i, j] = (X_BHLL * pairs_BLL[:, None]).sum((0, 2, 3)) / pairs_BLL.sum()
    return out


def padding(length: int) -> Tensor:
    valid_BL = torch.ones(2, length, dtype=torch.bool)
    valid_BL[0, : length // 3] = False
    valid_BL[1, length // 8 : length // 4] = False
    valid_BL[1, -(length // 9) :] = False
    return valid_BL


def assert_same(length: int, resolution: int, padded: bool = False, decay: float = 0.1, **options: Any) -> None:
    made = problem(length, decay=decay)
    valid_BL = padding(length) if padded else torch.ones(2, length, dtype=torch.bool)
    found = mixing_maps(**made, scale=SCALE, resolution=resolution, valid_BL=valid_BL if padded else None, **options)  # type: ignore[arg-type]
    cells = min(resolution, length)
    for own, X_BHLL in zip(found, matrices(made, valid_BL, **options), strict=True):
        assert own.shape == (HEADS, cells, cells)
        torch.testing.assert_close(own, averaged(X_BHLL, valid_BL, cells), rtol=1e-10, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("length", "resolution"), [(1, 64), (3, 8), (64, 8), (63, 8), (130, 7), (256, 16), (300, 1), (20, 20)]
)
def test_lengths_and_resolutions(poisoned: None, length: int, resolution: int, padded: bool) -> None:
    assert_same(length, resolution, padded=padded and length > 1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"window": 7, "softcap": 2.0},
        {"window": 150},
        {"sinks_H": SINKS_H},
        {"window": 70, "softcap": 1.5, "sinks_H": SINKS_H},
    ],
)
def test_teacher_variants(poisoned: None, options: dict[str, Any], padded: bool) -> None:
    assert_same(270, 9, padded=padded, **options)


@pytest.mark.parametrize("decay", [0.0, 5.0, 1000.0])
def test_decays_of_any_strength(poisoned: None, decay: float) -> None:
    assert_same(200, 10, decay=decay)


def test_above_the_diagonal_is_nan_and_beyond_the_window_is_zero() -> None:
    student, teacher = mixing_maps(**problem(80), scale=SCALE, resolution=8, window=10)  # type: ignore[arg-type]
    above_RR = torch.ones(8, 8, dtype=torch.bool).triu(1)
    for maps in (student, teacher):
        assert torch.equal(maps.isnan(), above_RR.expand(HEADS, 8, 8))
    assert teacher[:, 5, 3].abs().max() == 0
    assert (student[:, 5, 3] != 0).all()
    # rows of attention sum to 1 over what they see: a diagonal cell of 10 tokens has 55 pairs, the one beside it 100
    torch.testing.assert_close(55 * teacher[:, 5, 5] + 100 * teacher[:, 5, 4], torch.full((HEADS,), 10.0).double())


def test_heads_are_read_in_the_order_asked_for() -> None:
    made = {**problem(40), "sinks_H": SINKS_H}
    everything = mixing_maps(**made, scale=SCALE, resolution=5)  # type: ignore[arg-type]
    some = mixing_maps(**made, scale=SCALE, resolution=5, heads=[3, 0])  # type: ignore[arg-type]
    for own, all_of_them in zip(some, everything, strict=True):
        torch.testing.assert_close(own, all_of_them[[3, 0]], rtol=0, atol=0, equal_nan=True)


def test_weight_and_skip_may_be_left_out() -> None:
    made = problem(40)
    del made["D_H"], made["w_BLH"]
    given = {**made, "D_H": torch.zeros(HEADS), "w_BLH": torch.ones(2, 40, HEADS)}
    first, second = (mixing_maps(**m, scale=SCALE, resolution=5)[0] for m in (made, given))  # type: ignore[arg-type]
    torch.testing.assert_close(first, second, equal_nan=True)


def test_padded_tokens_have_no_influence() -> None:
    made, valid_BL = problem(150), padding(150)
    options: dict[str, Any] = {"scale": SCALE, "resolution": 6, "valid_BL": valid_BL}
    first = mixing_maps(**made, **options)
    for name in ("C_BLHN", "B_BLHN", "log_a_BLH", "w_BLH", "q_BLHK", "k_BLGK"):
        made[name][~valid_BL] = float("nan")
    for before, after in zip(first, mixing_maps(**made, **options), strict=True):
        assert before[:, 5, 1].isfinite().all()
        torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
    options["valid_BL"] = torch.zeros_like(valid_BL)
    assert all(maps.isnan().all() for maps in mixing_maps(**made, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_computed_in_float32_without_gradients_even_under_autocast(dtype: Any) -> None:
    made = problem(90, dtype=dtype)
    wanted = mixing_maps(**{n: t.double() for n, t in made.items()}, scale=SCALE, resolution=9)  # type: ignore[arg-type]
    made["C_BLHN"].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mixing_maps(**made, scale=SCALE, resolution=9)  # type: ignore[arg-type]
    for own, exact in zip(found, wanted, strict=True):
        assert own.dtype == torch.float32
        assert not own.requires_grad
        torch.testing.assert_close(own.double(), exact, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_no_tensor_reaches_length_squared() -> None:
    made = problem(1024, batch=1)
    with LargestTensor() as largest:
        mixing_maps(**made, scale=SCALE, resolution=32, window=300)  # type: ignore[arg-type]
    assert largest.numel <= 128 * 1024


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resolution": 0}, r"mixing_maps\.resolution: must be at least 1 cell; got 0\."),
        ({"heads": [0, 4]}, r"mixing_maps\.heads: a head must be in 0\.\.3; got 4\."),
        ({"heads": [-1]}, "got -1"),
        ({"window": 0}, r"mixing_maps\.window"),
        ({"D_H": torch.zeros(3)}, r"mixing_maps\.D_H: must have shape \(4,\)"),
        ({"k_BLGK": torch.zeros(2, 9, 2, 6)}, r"mixing_maps\.k_BLGK"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixing_maps(**{**problem(8), "scale": 1.0, **change})
