"""The mixing losses in Triton, under its interpreter or on a GPU, against both matrices written out in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ssmorph.kernels.mixing import LOSSES, mixing_loss
from tests.kernels.test_mixing import HEADS, NAMES, padding, problem

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def wide_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 in the tiles that half types ship with: the interpreter's time is by tile, whatever its size."""
    from ssmorph.kernels.mixing import triton

    rows = tuple(replace(row, rows=64) for row in triton.LAUNCHES["sm_90", 4])
    if DEVICE == "cpu":
        monkeypatch.setitem(triton.LAUNCHES, ("sm_90", 4), rows)


def run(made: dict[str, Tensor], backend: str, **options: Any) -> list[Tensor]:
    """The loss per head, and the gradient of a weighted sum of it for every student tensor."""
    made = {name: t.to(DEVICE).requires_grad_(name in NAMES) for name, t in made.items()}
    options = {name: t.to(DEVICE) if isinstance(t, Tensor) else t for name, t in options.items()}
    loss_H = mixing_loss(**made, scale=0.4, per_head=True, backend=backend, **options)  # type: ignore[arg-type]
    weights_H = torch.arange(1.0, HEADS + 1, dtype=loss_H.dtype, device=DEVICE)
    return [loss_H, *torch.autograd.grad((loss_H * weights_H).sum(), [made[name] for name in NAMES])]


def assert_near(made: dict[str, Tensor], tolerance: float, dtype: Any = torch.float32, **options: Any) -> None:
    """Each result within `tolerance` of its largest value, or of 0 where terms near 1 cancel (d log_a)."""
    # the reference sees the same rounded inputs
    rounded = {name: t.to(dtype) for name, t in made.items()}
    wanted = run({name: t.double() for name, t in rounded.items()}, "reference", **options)
    for name, found, exact in zip(("loss", *NAMES), run(rounded, "triton", **options), wanted, strict=True):
        error, largest = (found.double() - exact).abs().max(), exact.abs().max()
        assert error <= tolerance * largest + 3e-6, f"{name}: {error} of {largest}"


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("length", [1, 3, 63, 65, 130])
def test_lengths(loss: str, length: int) -> None:
    assert_near(problem(length, batch=2 if length < 70 else 1), 2e-6, loss=loss)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "options",
    [
        {"window": 7, "softcap": 2.0},
        {"window": 70, "sinks_H": torch.tensor([0.5, 0.0, 2.0, 8.0], dtype=torch.float64)},
    ],
)
def test_teacher_variants(loss: str, options: dict[str, Any]) -> None:
    assert_near(problem(100, batch=1), 2e-6, loss=loss, **options)


@pytest.mark.parametrize("loss", LOSSES)
def test_padding(loss: str) -> None:
    valid_BL = padding(290)[:, 140:270]
    made = problem(130)
    assert_near(made, 2e-6, loss=loss, valid_BL=valid_BL, window=40)
    poisoned = {n: t if n == "D_H" else t.masked_fill(~valid_BL.reshape(2, 130, *[1] * (t.ndim - 2)), float("nan"))
                for n, t in made.items()}  # fmt: skip
    first, second = (run({n: t.float() for n, t in m.items()}, "triton", loss=loss, valid_BL=valid_BL)
                     for m in (made, poisoned))  # fmt: skip
    for before, after in zip(first, second, strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("decay", "tolerance"), [(0.0, 2e-6), (5.0, 2e-5), (1000.0, 1e-3)])
def test_decays_of_any_strength(loss: str, decay: float, tolerance: float) -> None:
    assert_near(problem(100, batch=1, decay=decay), tolerance, loss=loss)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_sudden_decay_between_blocks_stays_precise(loss: str) -> None:
    """The decays of far blocks are sums from the diagonal outwards: a huge one far back must not blur the near ones."""
    made = problem(200, batch=1)
    made["log_a_BLH"][:, 40] = -1e6
    assert_near(made, 3e-5, loss=loss)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_half_types_are_multiplied_as_they_are(loss: str, dtype: Any, tolerance: float) -> None:
    assert_near(problem(130, batch=1), tolerance, dtype, loss=loss)


@pytest.mark.parametrize("loss", LOSSES)
def test_without_gradients_the_loss_is_the_same(loss: str) -> None:
    made = {name: t.float().to(DEVICE) for name, t in problem(70).items()}
    with torch.no_grad():
        alone = mixing_loss(**made, scale=0.4, loss=loss, backend="triton")  # type: ignore[arg-type]
    assert not alone.requires_grad
    torch.testing.assert_close(alone, run(made, "triton", loss=loss)[0].mean().detach(), rtol=0, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_student_without_weight_or_direction_has_finite_gradients(loss: str) -> None:
    made = problem(70, batch=1)
    made["C_BLHN"][:, 5:9] = 0
    made["D_H"].zero_()
    assert_near(made, 2e-6, loss=loss)


@pytest.mark.parametrize("size", [1e-20, 1e-24])
def test_a_student_too_small_to_square_has_finite_gradients(size: float) -> None:
    """1 / <M,M> overflows in float32, or <M,M> is 0."""
    made = {name: t.float() for name, t in problem(70, batch=1).items()}
    made["C_BLHN"] *= size
    made["D_H"].zero_()
    assert all(t.isfinite().all() for t in run(made, "triton", loss="cosine"))


def test_refusals_name_the_rule() -> None:
    with pytest.raises(ValueError, match="computes in float32"):
        run(problem(4), "triton")
    made = {name: t.float() for name, t in problem(4).items()}
    made["C_BLHN"] = made["B_BLHN"] = torch.zeros(2, 4, 2, 300)
    with pytest.raises(ValueError, match="widths up to 128"):
        run(made, "triton")
