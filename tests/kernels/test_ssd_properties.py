"""The scan on a CPU: gradients by finite differences, and agreement with the recurrence on shapes drawn at random."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ssmorph.kernels.ssd import BACKENDS, ssd

from .conftest import on_cpu, runnable
from .test_ssd import assert_same, inputs, outputs_and_gradients

# the second crosses the border of a chunk of 64 tokens, in the middle of a document
LENGTHS = {"short": (5, 2, 2), "two-chunks": (67, 1, 1)}
EVERY = ["reference", *on_cpu(BACKENDS)]


def segments(lengths: list[int]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("size", LENGTHS)
@pytest.mark.parametrize("name", EVERY)
def test_finite_differences(name: str, size: str, packed: bool) -> None:
    runnable(BACKENDS, name)
    length, heads, width = LENGTHS[size]
    if name == "reference" and length > 5:
        length = 12  # it has no chunks
    tensors = {n: t.requires_grad_() for n, t in inputs(length=length, heads=heads, width=width, state=2).items()}
    segment_BL = segments([2, length - 3, 1]) if packed else None

    def call(*values: Tensor) -> tuple[Tensor, Tensor]:
        return ssd(**dict(zip(tensors, values, strict=True)), segment_BL=segment_BL, backend=name)

    assert torch.autograd.gradcheck(call, tuple(tensors.values()))


@pytest.mark.parametrize("name", on_cpu(BACKENDS))
def test_random_shapes(name: str) -> None:
    hypothesis = pytest.importorskip("hypothesis")
    runnable(BACKENDS, name)
    st = hypothesis.strategies
    shapes = st.fixed_dictionaries(
        {
            "batch": st.integers(1, 3),
            "groups": st.integers(1, 3),
            "width": st.integers(1, 9),
            "state": st.integers(1, 9),
            "decay": st.sampled_from([0.0, 0.01, 0.3, 5.0]),
        }
    )
    absent = st.sets(st.sampled_from(["w_BLH", "D_H", "initial_state_BHPN"]))

    @hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
    @hypothesis.given(shapes, st.integers(1, 3), st.lists(st.integers(1, 70), min_size=1, max_size=4), absent)
    def agree(shape: dict[str, Any], share: int, lengths: list[int], left_out: set[str]) -> None:
        tensors = inputs(length=sum(lengths), heads=share * shape["groups"], **shape)
        tensors = {n: t for n, t in tensors.items() if n not in left_out}
        packed = {"segment_BL": segments(lengths).expand(shape["batch"], -1)} if len(lengths) > 1 else {}
        assert_same(
            outputs_and_gradients(tensors, name, **packed), outputs_and_gradients(tensors, "reference", **packed)
        )

    agree()
