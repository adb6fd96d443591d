"""Where mixers start when they are not the calibrated copy: as the peers' published code starts them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ssmorph.convert.families import FAMILIES
from ssmorph.convert.start import conv_bias, conv_rows, gate_rows
from ssmorph.convert.surgery import copy_attention
from tests.models import tiny_teacher

LLAMA = FAMILIES["llama"]


@pytest.mark.parametrize("kind", ["mamba2", "discrete_mamba2"])
def test_a_random_start_takes_nothing_from_the_teacher(kind: str) -> None:
    starts = []
    for factor in (1, 3):
        teacher = tiny_teacher(attention_bias=True)
        for p in teacher.model.layers[1].self_attn.parameters():
            p.data *= factor
        torch.manual_seed(5)
        starts.append(copy_attention(teacher, LLAMA, 1, kind, init="random").state_dict())
    for name, tensor in starts[0].items():
        assert torch.equal(tensor, starts[1][name]), name
    assert torch.equal(starts[0]["D"], torch.ones(6))


def test_mohawks_random_start_passes_the_scan_on_unchanged() -> None:
    mixer = copy_attention(tiny_teacher(), LLAMA, 1, "discrete_mamba2", init="random")
    assert not gate_rows(mixer).any()
    assert torch.allclose(F.silu(mixer.z_bias), torch.ones_like(mixer.z_bias))  # type: ignore[arg-type]
    u = torch.randn(1, 5, 48)
    s = mixer.scan_inputs(u)
    assert torch.allclose(s.x_BLHP.flatten(2), F.linear(u, conv_rows(mixer)[:48]), atol=1e-6)
    # no bias of the decay: softplus of small numbers
    assert 0.3 < s.log_a_BLH.neg().mean() < 1.1


@pytest.mark.parametrize("init", ["random", "projections"])
def test_mamba2_starts_with_published_steps_and_rates(init: str) -> None:
    state = copy_attention(tiny_teacher(), LLAMA, 1, "mamba2", init=init).state_dict()
    steps, rates = F.softplus(state["dt_bias"]), state["A_log"].exp()
    for drawn, low, high in ((steps, 1e-3, 0.1), (rates, 1.0, 16.0)):
        assert torch.all((drawn > 0.999 * low) & (drawn < 1.001 * high))
    assert len(set(rates.tolist())) == len(rates)
    assert state["conv1d.weight"].abs().min() > 0


def test_projections_are_copied_and_the_rest_is_drawn() -> None:
    teacher = tiny_teacher(attention_bias=True)
    torch.manual_seed(1)
    mixer = copy_attention(teacher, LLAMA, 1, "mamba2", init="projections")
    copy = copy_attention(teacher, LLAMA, 1, "mamba2")
    assert torch.equal(conv_rows(mixer), conv_rows(copy))
    assert torch.equal(mixer.out_proj.weight, copy.out_proj.weight)
    assert not torch.equal(mixer.conv1d.weight, copy.conv1d.weight)
    # far from a window's start a bias comes through the drawn taps as it would before them
    plain = tiny_teacher()
    plain.load_state_dict({n: t for n, t in teacher.state_dict().items() if n in plain.state_dict()})
    torch.manual_seed(1)
    without = copy_attention(plain, LLAMA, 1, "mamba2", init="projections")
    bias = conv_bias(copy)
    assert bias.abs().min() > 0
    assert torch.allclose(conv_bias(mixer) - conv_bias(without), mixer.conv1d.weight.sum((1, 2)) * bias, atol=1e-6)
