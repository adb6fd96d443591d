"""The scan on views: strides in every dimension, expanded tensors, NaN beside the values; and bits that repeat."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssmorph.kernels.ssd import ssd, ssd_step

from .layouts import LAYOUTS, apart, turned
from .test_ssd import assert_same, inputs, outputs_and_gradients


def gradients(views: dict[str, Tensor], backend: str) -> list[Tensor]:
    """As outputs_and_gradients, but of the views themselves."""
    leaves = {name: t.detach().requires_grad_() for name, t in views.items()}
    y, state = ssd(**leaves, backend=backend)
    g = torch.Generator().manual_seed(1)
    on_y, on_state = (torch.randn(t.shape, generator=g, dtype=torch.float64).to(t) for t in (y, state))
    # the gradients that come in are views too
    torch.autograd.backward([y, state], [apart(on_y), turned(on_state)])
    return [y.detach(), state.detach(), *(t.grad for t in leaves.values())]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("length", [1, 67])
def test_any_strides(length: int, layout: str, scan_backend: str, poisoned: None) -> None:
    tensors = inputs(batch=2, length=length, heads=4, groups=2, width=6, state=5)
    views = {name: LAYOUTS[layout](t) for name, t in tensors.items()}
    assert_same(gradients(views, scan_backend), outputs_and_gradients(tensors, "reference"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_strided_input(layout: str, scan_backend: str) -> None:
    tensors = {n: t.float() for n, t in inputs(batch=2, length=40, heads=4, groups=2).items()}
    expected = ssd(**tensors, backend=scan_backend)
    for name, t in tensors.items():
        own = ssd(**tensors | {name: LAYOUTS[layout](t)}, backend=scan_backend)
        assert_same(list(own), list(expected), 1e-6)


def test_expanded_inputs(scan_backend: str, poisoned: None) -> None:
    """One value for all tokens, heads, groups or rows, as a padded or constant decay has it."""
    tensors = inputs(batch=3, length=70, heads=4, groups=2)
    first = {
        "x_BLHP": (slice(None), slice(None), slice(1)),
        "log_a_BLH": (slice(1), slice(1)),
        "B_BLGN": (slice(None), slice(None), slice(1)),
        "C_BLGN": (slice(1),),
        "w_BLH": (slice(None), slice(None), slice(1)),
        "D_H": (slice(1),),
        "initial_state_BHPN": (slice(1), slice(1)),
    }
    views = {name: t[first[name]].expand(t.shape) for name, t in tensors.items()}
    own = outputs_and_gradients({name: t.contiguous() for name, t in views.items()}, "reference")
    leaves = {name: t[first[name]].clone().requires_grad_() for name, t in tensors.items()}
    y, state = ssd(**{name: t.expand(tensors[name].shape) for name, t in leaves.items()}, backend=scan_backend)
    g = torch.Generator().manual_seed(1)
    on_y, on_state = (torch.randn(t.shape, generator=g, dtype=torch.float64) for t in (y, state))
    ((y * on_y).sum() + (state * on_state).sum()).backward()
    summed = [grad.sum_to_size(leaf.shape) for grad, leaf in zip(own[2:], leaves.values(), strict=True)]
    assert_same([y.detach(), state.detach(), *(t.grad for t in leaves.values())], [*own[:2], *summed])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["single", "double"])
def test_same_bits_again(dtype: torch.dtype, scan_backend: str) -> None:
    tensors = {n: t.to(dtype) for n, t in inputs(batch=2, length=300, heads=3, groups=1, width=20, state=9).items()}
    first, second = (outputs_and_gradients(tensors, scan_backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_inputs_are_left_alone(scan_backend: str) -> None:
    tensors = inputs(length=70)
    before = {name: t.clone() for name, t in tensors.items()}
    outputs_and_gradients(tensors, scan_backend)
    ssd(**tensors, backend=scan_backend)
    assert all(torch.equal(t, before[name]) for name, t in tensors.items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_on_any_strides(layout: str, step_backend: str, poisoned: None) -> None:
    tensors = inputs(batch=2, length=1, heads=4, groups=2, width=6, state=5)
    single = {n: t.float() for n, t in tensors.items()}
    expected, final = ssd(**single, backend="reference")
    state = LAYOUTS[layout](single["initial_state_BHPN"])
    token = [LAYOUTS[layout](single[n][:, 0]) for n in ("x_BLHP", "log_a_BLH", "B_BLGN", "C_BLGN", "w_BLH")]
    y = ssd_step(state, *token[:4], w_BH=token[4], D_H=LAYOUTS[layout](single["D_H"]), backend=step_backend)
    assert_same([y, state], [expected[:, 0], final], 1e-5)
