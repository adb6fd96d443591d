"""Calibration: its closed forms against what they claim, and never worse than the copy or than nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssmorph.convert.calibrate import CalibrationOptions, _Distance, calibrate
from ssmorph.convert.capture import Attended, MixerCall, captured
from ssmorph.convert.families import FAMILIES
from ssmorph.convert.headfit import balanced_basis, fit_heads
from ssmorph.convert.moments import Moments
from ssmorph.kernels.ssd import ssd
from tests.models import tiny_hybrid, tiny_teacher

LLAMA = FAMILIES["llama"]


def windows(count: int = 24) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (2, 48), generator=g) for _ in range(count)]


@pytest.mark.parametrize("kind", ["mamba2", "discrete_mamba2"])
@pytest.mark.parametrize(("inputs", "bias"), [("student", False), ("student", True), ("teacher", False)])
def test_calibration_explains_what_copy_and_deletion_do_not(kind: str, inputs: str, bias: bool) -> None:
    teacher = tiny_teacher(attention_bias=bias)
    student = tiny_hybrid(kind, teacher=teacher)
    fits = calibrate(teacher, student, LLAMA, windows(), CalibrationOptions(inputs=inputs))
    assert [f.layer for f in fits] == [1, 3]
    for fit in fits:
        assert fit.accepted
        assert fit.error < min(fit.error_copy, 1.0)
    # the reported error is the one of the mixer itself, on new text
    fresh = windows(30)[24:]
    errors = []
    for tokens in fresh:
        with captured(teacher, LLAMA, [1], attention=False) as calls, torch.no_grad():
            teacher(tokens)
        own = student.mixers()[1](calls[1].input_BLD)[0].detach()
        errors.append((own - calls[1].output_BLD).square().sum() / calls[1].output_BLD.square().sum())
    assert float(torch.stack(errors).mean()) < 1.0
    assert abs(float(torch.stack(errors).mean()) - fits[0].error) < 0.2


def test_a_fit_that_does_not_help_leaves_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny_teacher()
    student = tiny_hybrid("discrete_mamba2", teacher=teacher)
    before = {n: p.clone() for n, p in student.mixers()[1].named_parameters()}
    monkeypatch.setattr(Moments, "error", lambda self, weight: 2.0)
    fits = calibrate(teacher, student, LLAMA, windows(6), CalibrationOptions())
    assert not any(f.accepted for f in fits)
    assert all(torch.equal(p, before[n]) for n, p in student.mixers()[1].named_parameters())


def test_moments_solve_least_squares() -> None:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 5, generator=g)
    moments = Moments(5, 3, torch.device("cpu"))
    for _ in range(4):
        f = torch.randn(2, 50, 5, generator=g)
        moments.add(f, f @ weight.T)
    assert torch.allclose(moments.solve(1e-9, torch.zeros(3, 5)).float(), weight, atol=1e-4)
    assert moments.error(weight) < 1e-6
    assert abs(moments.error(torch.zeros(3, 5)) - 1) < 1e-6
    prior = torch.randn(3, 5, generator=g)
    assert torch.allclose(moments.solve(1e9, prior).float(), prior, atol=1e-4)


def test_balanced_basis_keeps_products_and_orders_by_weight() -> None:
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(2, 6, 6, generator=g, dtype=torch.float64)
    q, k = (torch.randn(400, 2, 6, generator=g, dtype=torch.float64) @ m for m in (mix[0], mix[1]))
    to_q, to_k = balanced_basis(q, k)
    q2, k2 = torch.einsum("hnm,thm->thn", to_q, q), torch.einsum("hnm,thm->thn", to_k, k)
    assert torch.allclose((q2 * k2).sum(-1), (q * k).sum(-1), rtol=1e-6)
    sizes = q2.square().mean(0)
    assert torch.allclose(sizes, k2.square().mean(0), rtol=2e-2)  # the jitter that keeps the moments definite
    assert bool((sizes.diff(dim=-1) <= 1e-6).all())


def test_heads_made_of_the_model_are_recovered() -> None:
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 60, 3, 5, generator=g) for _ in range(2))
    v = torch.randn(2, 60, 3, 4, generator=g)
    distance = torch.tensor([2.0, 16.0, 64.0], dtype=torch.float64)
    log_a = -torch.log1p(1 / distance).float().expand(2, 60, 3)
    ones = torch.ones(2, 60, 3, 1)
    o = 0.5 * ssd(v, log_a, k, q)[0] - 2.0 * ssd(v, log_a, ones, ones)[0] + 0.25 * v
    fit = fit_heads(q, k, v, o)
    assert torch.equal(fit.distance_H, distance)
    for part, expected in ((fit.gamma_H, 0.5), (fit.beta_H, -2.0), (fit.delta_H, 0.25)):
        assert torch.allclose(part, torch.full_like(part, expected), atol=1e-3)
    assert float(fit.error_H.max()) < 1e-4


@pytest.mark.parametrize("kind", ["mamba2", "discrete_mamba2"])
@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj"])
def test_a_pruned_head_is_calibrated_too(kind: str, part: str) -> None:
    teacher = tiny_teacher()
    for layer in teacher.model.layers:
        layer.self_attn.get_submodule(part).weight[:8] = 0
    student = tiny_hybrid(kind, teacher=teacher)
    fits = calibrate(teacher, student, LLAMA, windows(6), CalibrationOptions())
    assert all(fit.accepted and fit.error < 1.0 for fit in fits)
    for mixer in student.mixers().values():
        assert all(bool(p.isfinite().all()) and float(p.detach().abs().max()) < 1e4 for p in mixer.parameters())
    assert bool(student(windows(1)[0]).logits.isfinite().all())


@pytest.mark.parametrize("dead", [0, 1, 2])
def test_a_pruned_head_has_weight_zero_and_changes_no_other(dead: int) -> None:
    """Without queries or keys a head averages, without values it says nothing."""
    g = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 60, 3, 5, generator=g) for _ in range(3)]
    o = torch.randn(2, 60, 3, 5, generator=g)
    basis, fit = balanced_basis(*(t.flatten(0, 1) for t in parts[:2])), fit_heads(*parts, o)
    parts[dead][:, :, 0] = 0
    pruned_basis, pruned = balanced_basis(*(t.flatten(0, 1) for t in parts[:2])), fit_heads(*parts, o)
    assert all(torch.equal(own[1:], other[1:]) for own, other in zip(pruned_basis, basis, strict=True))
    assert all(torch.equal(own[1:], other[1:]) for own, other in zip(pruned, fit, strict=True))
    assert all(bool(t.isfinite().all()) for t in (*pruned_basis, *pruned))
    assert pruned.gamma_H[0] == 0
    assert (pruned.beta_H[0] == pruned.delta_H[0] == 0) == (dead == 2)


def test_attention_distance_is_unbiased_by_the_window() -> None:
    """Attention that is exactly geometric in the distance gives its own decay, also in a short window."""
    rate, length = 0.1, 40
    positions = torch.arange(length, dtype=torch.float32)
    # q.k = -rate * (t - s) up to a constant per row: exp of it is geometric
    q = torch.stack([torch.ones(length), -positions], -1)[None, None]
    k = torch.stack([rate * positions, torch.zeros(length)], -1)[None, None]
    call = MixerCall(torch.empty(0), torch.empty(0), torch.empty(0), Attended(q, k, 1.0))
    distance = _Distance(1)
    distance.add(call)
    expected = 1 / torch.expm1(torch.tensor(rate, dtype=torch.float64))
    assert torch.allclose(distance.solve(), expected, rtol=1e-3)
