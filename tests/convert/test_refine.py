"""Gradient steps inside calibration: they lower the error, repeat bit for bit, and are undone where they fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ssmorph.convert import calibrate as module
from ssmorph.convert.calibrate import CalibrationOptions, LayerFit, calibrate
from ssmorph.convert.families import FAMILIES
from tests.convert.test_calibrate import windows
from tests.models import tiny_hybrid, tiny_teacher

LLAMA = FAMILIES["llama"]
# of the tiny hybrids, a layer with Mamba-2 heads and one without any attention
KINDS = ("mamba2", "discrete_mamba2", "mamba2_heads", "windowed_mamba2")


def fitted(kind: str, **options: Any) -> tuple[Any, list[LayerFit]]:
    teacher = tiny_teacher()
    student = tiny_hybrid(kind, teacher=teacher)
    # random layers have little to be learned that holds elsewhere, so the window that judges is one that was fitted
    seen = windows(6)
    return student, calibrate(teacher, student, LLAMA, [*seen, seen[0]], CalibrationOptions(**options))


@pytest.mark.parametrize("kind", KINDS)
def test_steps_lower_the_error_and_leave_no_trace(kind: str) -> None:
    _, plain = fitted(kind)
    student, refined = fitted(kind, refine_steps=30)
    again, _ = fitted(kind, refine_steps=30)
    assert refined[0].error < 0.995 * plain[0].error
    wanted = {n: p.requires_grad for n, p in tiny_hybrid(kind).named_parameters()}
    for (name, p), other in zip(student.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, other), name
        assert p.grad is None, name
        assert p.requires_grad == wanted[name], name


def test_steps_that_do_harm_are_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fits = fitted("mamba2")

    def wreck(parameters: dict[str, torch.Tensor], *_: Any) -> None:
        for p in parameters.values():
            p.mul_(-3).add_(1)

    monkeypatch.setattr(module, "refine", wreck)
    student, same = fitted("mamba2", refine_steps=1)
    assert same == fits
    for (name, p), other in zip(student.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, other), name
