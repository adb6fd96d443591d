"""Convolution, norm and losses on views with strides in every dimension, as whoever reads by address must get right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ssmorph.kernels.conv import causal_conv
from ssmorph.kernels.distill import distill_loss, distill_topk_loss
from ssmorph.kernels.mixing import mixing_loss

from . import test_conv, test_distill, test_mixing, test_norm
from .conftest import DEVICE
from .layouts import LAYOUTS, apart

Call = tuple[Any, dict[str, Tensor], tuple[str, ...], dict[str, Any]]


def convolution() -> Call:
    tensors, options = test_conv.inputs(length=37, batch=2, channels=9, past=True, packed=True)
    return causal_conv, tensors | {"segment_BL": options.pop("segment_BL")}, tuple(tensors), options


def norm() -> Call:
    tensors, options = test_norm.inputs(length=21, width=6, groups=2, batch=2)
    return test_norm.norm, tensors, tuple(tensors), options


def mixing() -> Call:
    tensors = test_mixing.problem(70)
    more = {"sinks_H": torch.linspace(-1, 2, test_mixing.HEADS), "valid_BL": torch.arange(140).view(2, 70) % 7 > 0}
    return mixing_loss, tensors | more, test_mixing.NAMES, {"scale": 0.4}


def distillation() -> Call:
    labels = {"labels_T": test_distill.labels(), "mask_T": torch.arange(21, device=DEVICE) % 5 > 0}
    return distill_loss, test_distill.problem() | labels, test_distill.STUDENT, {"ce_weight": 0.5}


def buckets() -> Call:
    made = test_distill.problem()
    tensors = test_distill.student_of(made) | test_distill.kept(made, 5)
    return distill_topk_loss, tensors, test_distill.STUDENT, {}


def results(call: Call, tensors: dict[str, Tensor], backend: str) -> list[Tensor]:
    """The output and the gradients of the tensors themselves."""
    function, _, names, options = call
    leaves = {n: t.detach().requires_grad_() if n in names else t for n, t in tensors.items()}
    out = function(**leaves, **options, backend=backend)
    out.backward(apart(torch.linspace(-1, 1, out.numel(), device=DEVICE).view(out.shape)) if out.ndim else None)
    return [out.detach(), *(leaves[name].grad for name in names)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["chunked", "triton"])
@pytest.mark.parametrize("make", [convolution, norm, mixing, distillation, buckets], ids=lambda make: make.__name__)
def test_any_strides(make: Any, backend: str, layout: str, poisoned: None, needs_triton: None) -> None:
    call = make()
    tensors = {n: t.to(DEVICE, torch.float32 if t.is_floating_point() else None) for n, t in call[1].items()}
    views = {n: LAYOUTS[layout](t) for n, t in tensors.items()}
    for own, expected in zip(results(call, views, backend), results(call, tensors, backend), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-6)
