"""One scan in parts: packed documents, a prefill in pieces, and steps, against the whole, on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssmorph.kernels.ssd import ssd, ssd_step

from .test_ssd import TOLERANCES, assert_same, inputs, outputs_and_gradients

SEQUENCE = ("x_BLHP", "log_a_BLH", "B_BLGN", "C_BLGN", "w_BLH")


def part(tensors: dict[str, Tensor], start: int, end: int) -> dict[str, Tensor]:
    """The tokens from start to end, with what belongs to no token."""
    return {n: t[:, start:end] if n in SEQUENCE else t for n, t in tensors.items()}


def take_step(state: Tensor, tensors: dict[str, Tensor], i: int, name: str) -> Tensor:
    """y of token i, [B, H, P]."""
    x, log_a, B, C, w = (tensors[n][:, i] for n in SEQUENCE)
    return ssd_step(state, x, log_a, B, C, w_BH=w, D_H=tensors["D_H"], backend=name)


@pytest.mark.parametrize("state", [True, False], ids=["from-a-state", "from-zero"])
@pytest.mark.parametrize("lengths", [(5, 60, 64, 1, 21), (1, 1, 1), (64, 64), (100, 3), (1, 130)], ids=str)
def test_packed_equals_separate(lengths: tuple[int, ...], state: bool, scan_backend: str, poisoned: None) -> None:
    tensors = inputs(length=sum(lengths), heads=4, groups=2)
    if not state:
        del tensors["initial_state_BHPN"]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    packed = outputs_and_gradients(tensors, scan_backend, cu_seqlens=cu_seqlens)
    assert_same(packed, outputs_and_gradients(tensors, "reference", cu_seqlens=cu_seqlens))
    parts = []
    for start, length in zip(cu_seqlens.tolist(), lengths, strict=False):
        own = part(tensors, start, start + length)
        if start > 0:
            own.pop("initial_state_BHPN", None)
        y, final = ssd(**own, backend=scan_backend)
        parts.append(y)
    assert (torch.cat(parts, dim=1) - packed[0]).abs().max() < 1e-10
    assert (final - packed[1]).abs().max() < 1e-10


def test_documents_of_every_row(scan_backend: str) -> None:
    tensors = inputs(batch=3, length=150)
    segment_BL = torch.tensor([[0] * 70 + [1] * 80, [3] * 150, [-2] * 64 + [0] + [7] * 85], dtype=torch.int32)
    own = outputs_and_gradients(tensors, scan_backend, segment_BL=segment_BL)
    assert_same(own, outputs_and_gradients(tensors, "reference", segment_BL=segment_BL))
    assert not torch.allclose(own[0], ssd(**tensors, backend=scan_backend)[0])


def test_prefill_in_parts_equals_the_whole(scan_backend: str) -> None:
    tensors = inputs(batch=2, length=300, heads=4, groups=2)
    full = outputs_and_gradients(tensors, scan_backend)
    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    state, parts = leaves["initial_state_BHPN"], []
    for start, end in ((0, 37), (37, 38), (38, 166), (166, 300)):
        y, state = ssd(**part(leaves, start, end) | {"initial_state_BHPN": state}, backend=scan_backend)
        parts.append(y)
    y = torch.cat(parts, dim=1)
    g = torch.Generator().manual_seed(1)
    on_y, on_state = (torch.randn(t.shape, generator=g, dtype=torch.float64) for t in (y, state))
    ((y * on_y).sum() + (state * on_state).sum()).backward()
    assert_same([y.detach(), state.detach(), *(t.grad for t in leaves.values())], full)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["double", "single"])
def test_200_steps_equal_the_whole(dtype: torch.dtype, scan_backend: str, step_backend: str, poisoned: None) -> None:
    tensors = {n: t.to(dtype) for n, t in inputs(batch=3, length=200, heads=9, groups=3, width=6, state=5).items()}
    full, final = ssd(**tensors, backend=scan_backend)
    state = tensors["initial_state_BHPN"].clone()
    steps = torch.stack([take_step(state, tensors, i, step_backend) for i in range(200)], dim=1)
    assert_same([steps, state], [full, final], TOLERANCES[dtype])


def test_a_prefill_then_steps(scan_backend: str, step_backend: str) -> None:
    tensors = inputs(batch=2, length=90, heads=4, groups=2)
    full, final = ssd(**tensors, backend=scan_backend)
    y, state = ssd(**part(tensors, 0, 70), backend=scan_backend)
    state = state.detach().clone()
    steps = [take_step(state, tensors, i, step_backend).unsqueeze(1) for i in range(70, 90)]
    assert_same([torch.cat([y, *steps], 1), state], [full, final])


@pytest.mark.parametrize("absent", [("w_BH",), ("D_H",), ("w_BH", "D_H")], ids=str)
def test_a_step_without_options(absent: tuple[str, ...], step_backend: str, poisoned: None) -> None:
    tensors = inputs(batch=2, length=1, heads=3, groups=1)
    given = {"w_BH": tensors["w_BLH"][:, 0], "D_H": tensors["D_H"]}
    given = {n: t for n, t in given.items() if n not in absent}
    state = tensors["initial_state_BHPN"].clone()
    y = ssd_step(state, *(tensors[n][:, 0] for n in SEQUENCE[:4]), **given, backend=step_backend)
    rest = {n: t for n, t in tensors.items() if n.replace("BLH", "BH") not in absent}
    expected, final = ssd(**rest, backend="reference")
    assert_same([y, state], [expected[:, 0], final])
