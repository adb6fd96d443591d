"""Calibration, alignment, distillation and the window control on a tiny model of every family."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ssmorph.convert.calibrate import CalibrationOptions, calibrate
from ssmorph.convert.capture import captured
from ssmorph.convert.families import family_of
from ssmorph.convert.surgery import MixerChoice
from ssmorph.stages.artifact import copied_student
from ssmorph.stages.config import LogitsStage
from ssmorph.stages.controls import windowed
from ssmorph.stages.head_probe import gated_heads
from ssmorph.stages.mixing import align_matrices
from ssmorph.stages.placement_gates import blended
from ssmorph.stages.targets import divergence, end_of
from tests.families.hybrids import tokens
from tests.families.tiny import ROWS, family_teacher


def student_of(teacher: Any, kind: str = "mamba2", layers: tuple[int, ...] = (1, 3)) -> Any:
    return copied_student(teacher, family_of(teacher.config), layers, MixerChoice(kind=kind), 0, own_rest=False)


@pytest.mark.parametrize("kind", ["mamba2", "discrete_mamba2"])
@pytest.mark.parametrize("row", ROWS)
def test_calibration_beats_the_copy_and_deletion(row: str, kind: str) -> None:
    teacher = family_teacher(row)
    student = student_of(teacher, kind)
    windows = [tokens(2, 48, seed) for seed in range(12)]
    fits = calibrate(teacher, student, family_of(teacher.config), windows, CalibrationOptions())
    assert [fit.layer for fit in fits] == [1, 3]
    assert all(fit.accepted and fit.error < min(1.0, fit.error_copy) for fit in fits)
    assert student(windows[0]).logits.isfinite().all()


@pytest.mark.parametrize("row", ROWS)
def test_mixing_reaches_every_family(row: str) -> None:
    teacher = family_teacher(row)
    student = student_of(teacher)
    mixers = student.mixers()
    with captured(teacher, family_of(teacher.config), list(mixers), attention=True) as calls, torch.no_grad():
        teacher.base_model(tokens(2, 30), use_cache=False)
    for mixer in mixers.values():
        mixer.requires_grad_()
    losses = align_matrices(mixers, calls, "cosine")
    assert all(0 < loss < 2 for loss in losses.values())
    for mixer in mixers.values():
        assert mixer.in_proj.weight.grad.isfinite().all()
        assert mixer.in_proj.weight.grad.abs().max() > 0


@torch.no_grad()
@pytest.mark.parametrize("row", ROWS)
def test_the_distillation_loss_is_that_of_the_models_own_logits(row: str) -> None:
    """Biases of heads, multipliers and soft caps of logits included."""
    teacher = family_teacher(row)
    student, x = student_of(teacher), tokens(2, 20)
    stage: Any = LogitsStage(tokens=1, batch=1)
    own, taught = (model.base_model(x, use_cache=False).last_hidden_state.flatten(0, 1) for model in (student, teacher))
    ends = family_of(teacher.config).logits(teacher.config)
    sides = [end_of(model, ends, states) for model, states in ((student, own), (teacher, taught))]
    loss = divergence(stage, sides[1:], [1.0], sides[0], x.flatten(), torch.ones(own.shape[0], dtype=torch.bool))
    logs = [model(x, use_cache=False).logits.flatten(0, 1).log_softmax(-1) for model in (student, teacher)]
    expected = F.kl_div(*logs, log_target=True, reduction="batchmean")
    assert expected > 1e-3
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("row", ROWS)
def test_the_window_control_reaches_every_family(row: str) -> None:
    teacher, x = family_teacher(row), tokens(1, 30)
    control = partial(windowed, teacher, family_of(teacher.config), [1, 3])
    full = teacher(x, use_cache=False).logits
    with control(6):
        narrow = teacher(x, use_cache=False).logits
    with control(100):
        wide = teacher(x, use_cache=False).logits
    torch.testing.assert_close(wide, full, rtol=1e-4, atol=1e-5)
    assert (narrow - full)[:, -1].abs().max() > 1e-3
    torch.testing.assert_close(narrow[:, :2], full[:, :2], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("row", ROWS)
def test_gates_on_heads_and_on_layers_reach_every_family(row: str) -> None:
    teacher, x = family_teacher(row), tokens(1, 30)
    spec = family_of(teacher.config)
    shape = spec.shape(teacher.config)
    full = teacher(x, use_cache=False).logits
    student = student_of(teacher, layers=tuple(range(shape.layers)))
    with blended(student, teacher, spec, torch.ones(shape.layers)):
        torch.testing.assert_close(student(x, use_cache=False).logits, full, rtol=1e-4, atol=1e-5)
    gates = [torch.ones(1, shape.heads) for _ in range(shape.layers)]
    with gated_heads(teacher, spec, gates):
        torch.testing.assert_close(teacher(x, use_cache=False).logits, full, rtol=1e-4, atol=1e-5)
    # one head after another, each alone
    for layer, head in ((0, 0), (shape.layers - 1, shape.heads - 1)):
        gates[layer][0, head] = 0
        with gated_heads(teacher, spec, gates):
            assert (teacher(x, use_cache=False).logits - full).abs().max() > 1e-3
        gates[layer][0, head] = 1
