"""The Triton scan, more of its table in few programs: shares of groups, batches, widths, views, parts and steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from ssmorph.kernels.ssd import ssd, ssd_step

from .conftest import DEVICE
from .layouts import LAYOUTS
from .test_ssd import DECAYS, assert_same, case_inputs, inputs, outputs_and_gradients
from .test_ssd_parts import SEQUENCE, part
from .test_ssd_triton import assert_close, cut

__all__ = ["cut"]  # a fixture
CASES: list[dict[str, Any]] = [
    *({"length": 3, "batch": 3, "heads": 9, "groups": groups} for groups in (9, 3, 1)),
    {"length": 63, "batch": 3, "heads": 3, "groups": 1},
    {"length": 500, "batch": 3, "heads": 1},
    {"length": 1, "batch": 3, "heads": 9, "groups": 3, "absent": ("D_H",)},
    {"length": 40, "heads": 1, "width": 80, "state": 96},
    {"length": 40, "heads": 1, "width": 96, "state": 80},
    {"length": 33, "heads": 1, "width": 128, "state": 16},
]


def on_device(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: t.to(DEVICE) for name, t in case_inputs(case).items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_equals_the_recurrence(case: dict[str, Any], poisoned: None) -> None:
    assert_close(on_device(case), torch.float32, 1e-5)


@pytest.mark.parametrize("decay", DECAYS)
def test_extreme_decay_of_every_token(decay: str, cut: str) -> None:
    tensors = on_device({"length": 70, "heads": 1, "log_a": DECAYS[decay]})
    own = outputs_and_gradients({n: t.float() for n, t in tensors.items()}, "triton")
    # where nothing is kept, the decay's own gradient is 0 but for rounding
    assert_same([t.double() for t in own], outputs_and_gradients(tensors, "reference"), 1e-4)


@pytest.mark.parametrize("widths", [(256, 256), (256, 16), (16, 256)], ids=str)
def test_wide_half_types(widths: tuple[int, int], poisoned: None) -> None:
    width, state = widths
    assert_close(on_device({"length": 20, "heads": 1, "width": width, "state": state}), torch.bfloat16, 1.5e-2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout: str, cut: str, poisoned: None) -> None:
    plain = {n: t.float() for n, t in on_device({"length": 67, "heads": 2, "groups": 1, "width": 6}).items()}
    leaves = {n: LAYOUTS[layout](t).detach().requires_grad_() for n, t in plain.items()}
    twins = {n: t.clone().requires_grad_() for n, t in plain.items()}
    for tensors, views in ((leaves, True), (twins, False)):
        y, state = ssd(**tensors, backend="triton")
        on_y, on_state = (torch.linspace(-1, 1, t.numel(), device=DEVICE).view(t.shape) for t in (y, state))
        made = LAYOUTS[layout] if views else torch.clone
        torch.autograd.backward([y, state], [made(on_y), made(on_state)])
    assert all(torch.equal(leaf.grad, twins[name].grad) for name, leaf in leaves.items())


def test_expanded_inputs() -> None:
    plain = {n: t.float() for n, t in on_device({"length": 40, "batch": 2, "heads": 2}).items()}
    plain["B_BLGN"] = plain["B_BLGN"][:1].expand(2, -1, -1, -1)
    plain["C_BLGN"] = plain["C_BLGN"][:, :, :1].expand(-1, -1, 2, -1)
    plain["log_a_BLH"] = plain["log_a_BLH"][:, :1].expand(-1, 40, -1)
    plain["x_BLHP"] = plain["x_BLHP"][..., :1].expand(-1, -1, -1, 4)
    assert_close(plain, torch.float32, 1e-5)


def test_prefill_in_parts() -> None:
    tensors = {n: t.float() for n, t in on_device({"length": 150, "heads": 1}).items()}
    full, final = ssd(**tensors, backend="triton")
    state, parts = tensors["initial_state_BHPN"], []
    for start, end in ((0, 37), (37, 38), (38, 150)):
        y, state = ssd(**part(tensors, start, end) | {"initial_state_BHPN": state}, backend="triton")
        parts.append(y)
    assert torch.allclose(torch.cat(parts, dim=1), full, atol=1e-5)
    assert torch.allclose(state, final, atol=1e-5)


def test_200_steps_equal_the_whole() -> None:
    tensors = {n: t.float().to(DEVICE) for n, t in inputs(length=200, heads=1, width=6, state=5).items()}
    full, final = ssd(**tensors, backend="triton")
    state = tensors["initial_state_BHPN"].clone()
    D = LAYOUTS["apart"](tensors["D_H"])
    for i in range(200):
        x, log_a, B, C, w = (tensors[n][:, i] for n in SEQUENCE)
        y = ssd_step(state, x, log_a, B, C, w_BH=w, D_H=D, backend="triton")
        assert (y - full[:, i]).abs().max() <= 1e-5 * full.abs().max()
    assert (state - final).abs().max() <= 1e-5 * final.abs().max()
