"""The causal convolution and the gated group norm, against sums written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssmorph.kernels.conv import causal_conv, causal_conv_step
from ssmorph.kernels.norm import gated_group_norm


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for t in range(x.shape[1]):
        for k in range(weight.shape[1]):
            s = t - weight.shape[1] + 1 + k
            if s >= 0:
                y[:, t] += x[:, s] * weight[:, k]
    return y + bias


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("length", [1, 3, 17])
def test_convolution(width: int, length: int) -> None:
    x, weight, bias = draw(2, length, 5), draw(5, width, seed=1), draw(5, seed=2)
    assert torch.allclose(causal_conv(x, weight, bias), by_hand(x, weight, bias))
    assert torch.allclose(causal_conv(x, weight, bias, silu=True), F.silu(by_hand(x, weight, bias)))


def test_packed_equals_separate() -> None:
    x, weight, bias = draw(1, 12, 4), draw(4, 4, seed=1), draw(4, seed=2)
    segment = torch.tensor([[0] * 5 + [1] * 2 + [2] * 5])
    parts = [causal_conv(p, weight, bias) for p in x.split([5, 2, 5], dim=1)]
    packed = causal_conv(x, weight, bias, segment_BL=segment)
    assert torch.allclose(packed, torch.cat(parts, dim=1))
    assert not torch.allclose(packed, causal_conv(x, weight, bias))


def test_steps_equal_the_whole() -> None:
    x, weight, bias = draw(2, 9, 4), draw(4, 4, seed=1), draw(4, seed=2)
    whole = causal_conv(x, weight, bias, silu=True)
    past = x[:, 1:4].clone()
    for t in range(4, 9):
        assert torch.allclose(causal_conv_step(past, x[:, t], weight, bias, silu=True), whole[:, t])
    assert torch.allclose(causal_conv(x[:, 4:], weight, bias, silu=True, past_BKC=x[:, 1:4]), whole[:, 4:])


def test_gradients() -> None:
    x, weight, bias = (t.requires_grad_() for t in (draw(1, 6, 2), draw(2, 3, seed=1), draw(2, seed=2)))
    assert torch.autograd.gradcheck(lambda *t: causal_conv(*t, silu=True), (x, weight, bias))


def test_wrong_channels_are_named() -> None:
    with pytest.raises(ValueError, match=r"causal_conv\.weight_CK"):
        causal_conv(draw(1, 4, 3), draw(4, 4))
    with pytest.raises(ValueError, match=r"causal_conv\.past_BKC"):
        causal_conv(draw(1, 4, 3), draw(3, 4), past_BKC=draw(1, 2, 3))


def test_norm_is_per_group() -> None:
    y, gate, weight = draw(1, 2, 6), draw(1, 2, 6, seed=1), draw(6, seed=2)
    gated = y * F.silu(gate)
    for group in range(3):
        part = gated[..., 2 * group : 2 * group + 2]
        expected = weight[2 * group : 2 * group + 2] * part / (part.square().mean(-1, keepdim=True) + 1e-3).sqrt()
        own = gated_group_norm(y, gate, weight, groups=3, eps=1e-3)[..., 2 * group : 2 * group + 2]
        assert torch.allclose(own, expected)
    with pytest.raises(ValueError, match=r"gated_group_norm\.groups"):
        gated_group_norm(y, gate, weight, groups=4, eps=1e-3)
