"""Value and output path of one head together: the best pair of its rank, and worth more than the output projection."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssmorph.convert import values
from ssmorph.convert.families import FAMILIES
from ssmorph.convert.mixers.discrete_mamba2 import DiscreteMamba2Mixer
from ssmorph.convert.moments import Moments
from ssmorph.convert.start import conv_bias, conv_rows, identity_convolution, set_decay
from ssmorph.convert.surgery import copy_attention
from tests.models import tiny_teacher


def linear_mixer() -> DiscreteMamba2Mixer:
    mixer = copy_attention(tiny_teacher(attention_bias=True), FAMILIES["llama"], 1, "discrete_mamba2")
    assert isinstance(mixer, DiscreteMamba2Mixer)
    with torch.no_grad():
        bias = conv_bias(mixer).clone()
        identity_convolution(mixer)
        conv_bias(mixer).copy_(bias)
        mixer.D.fill_(0.5)
    set_decay(mixer, torch.full((mixer.shape.heads,), 4.0, dtype=torch.float64))
    return mixer


def test_the_pair_is_the_best_of_its_rank() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 7, generator=g) * torch.logspace(-1, 1, 7)
    y = x @ torch.randn(7, 5, generator=g)
    moments = Moments(7, 5, x.device)
    moments.add(x, y)
    into, out = values._pair(moments, 1e-9, torch.zeros(5, 7), 2)
    assert into.shape == (2, 7)
    assert out.shape == (5, 2)
    # Eckart-Young: what is lost of the exactly explained y are its three least singular values
    lost = torch.linalg.svdvals(y.double())[2:].square().sum() / y.double().square().sum()
    assert moments.error(out @ into) == pytest.approx(float(lost), rel=1e-4)


def test_a_perturbed_value_path_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "RIDGES", (1e-6,))
    monkeypatch.setattr(values, "SWEEPS", 3)
    mixer, g = linear_mixer(), torch.Generator().manual_seed(0)
    inputs: list[Tensor] = [torch.randn(2, 40, mixer.shape.hidden, generator=g) for _ in range(8)]
    with torch.no_grad():
        targets = [mixer(u)[0].clone() for u in inputs]
        rows, kept = conv_rows(mixer), conv_rows(mixer)[mixer.shape.inner :].clone()
        value = rows[: mixer.shape.inner]
        value += 0.5 * value.std() * torch.randn(value.shape, generator=g)
        conv_bias(mixer)[: mixer.shape.inner] += 0.3
        before = error(mixer, inputs, targets)
        values.fit_values(mixer, inputs, targets, judge=2)
    assert error(mixer, inputs, targets) < 0.02 * before
    assert torch.equal(conv_rows(mixer)[mixer.shape.inner :], kept)


@torch.no_grad()
def error(mixer: DiscreteMamba2Mixer, inputs: list[Tensor], targets: list[Tensor]) -> float:
    """Of the mixer as it runs, on all windows."""
    lost = sum(float((mixer(u)[0] - y).square().sum()) for u, y in zip(inputs, targets, strict=True))
    return lost / sum(float(y.square().sum()) for y in targets)
