"""The copy: whole head blocks, scales and biases, checked on the mixing matrix, where a wrong repeat shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ssmorph.convert.capture import attention_rows, captured
from ssmorph.convert.families import FAMILIES, attention_shape
from ssmorph.convert.linearise import inverse_silu, scale_scan
from ssmorph.convert.mixers.mamba2 import Mamba2Mixer
from ssmorph.convert.plan import resolve_layers
from ssmorph.convert.start import inverse_softplus, set_decay
from ssmorph.convert.surgery import copy_attention, expand_kv
from tests.models import tiny_hybrid, tiny_teacher

LLAMA = FAMILIES["llama"]


def copied(teacher: Any, kind: str, layer: int = 1) -> Any:
    return copy_attention(teacher, LLAMA, layer, kind)


def test_expanding_repeats_blocks_not_rows() -> None:
    shape = attention_shape(tiny_teacher().config)
    rows = torch.arange(shape.kv_heads * shape.head_dim)
    expanded = expand_kv(rows, shape).view(shape.heads, shape.head_dim)
    for head in range(shape.heads):
        group = head // (shape.heads // shape.kv_heads)
        assert torch.equal(expanded[head], rows.view(shape.kv_heads, -1)[group])


@pytest.mark.parametrize("bias", [False, True])
def test_discrete_matrix_is_the_unrotated_scaled_product(bias: bool) -> None:
    teacher = tiny_teacher(attention_bias=bias)
    mixer = copied(teacher, "discrete_mamba2")
    u = torch.randn(2, 11, 48)
    attention = teacher.model.layers[1].self_attn
    q = attention.q_proj(u).unflatten(-1, (6, 8))
    k, v = (m(u).unflatten(-1, (2, 8)).repeat_interleave(3, dim=2) for m in (attention.k_proj, attention.v_proj))
    s = mixer.scan_inputs(u)
    product = torch.einsum("blhn,bshn->bhls", s.C_BLGN, s.B_BLGN)
    assert torch.allclose(product, torch.einsum("blhn,bshn->bhls", q, k) * 8**-0.5, atol=1e-5)
    assert torch.allclose(s.x_BLHP, v, atol=1e-5)


def test_copied_output_projection_and_its_bias() -> None:
    teacher = tiny_teacher(attention_bias=True)
    mixer = copied(teacher, "mamba2")
    assert torch.equal(mixer.out_proj.weight, teacher.model.layers[1].self_attn.o_proj.weight)
    assert torch.equal(mixer.out_proj.bias, teacher.model.layers[1].self_attn.o_proj.bias)


@pytest.mark.parametrize("kind", ["mamba2", "discrete_mamba2"])
def test_the_scan_is_its_own_mixing_matrix(kind: str) -> None:
    mixer = tiny_hybrid(kind).mixers()[1]
    u = torch.randn(1, 9, 48)
    s = mixer.scan_inputs(u)
    cum = s.log_a_BLH.cumsum(1)
    causal = torch.ones(9, 9).tril()[None, :, :, None]
    decay = (cum[:, :, None] - cum[:, None]).exp() * causal
    matrix = torch.einsum("blhn,bshn->blsh", s.C_BLGN, s.B_BLGN) * decay
    matrix = matrix if s.w_BLH is None else matrix * s.w_BLH[:, None]
    y = torch.einsum("blsh,bshp->blhp", matrix, s.x_BLHP) + s.D_H[:, None] * s.x_BLHP
    _, channels, raw = mixer._split(mixer.in_proj(u))
    assert torch.allclose(y, mixer._scan(channels, raw, None, None, None), atol=1e-4 * y.abs().max().item())


@pytest.mark.parametrize("kind", ["mamba2", "discrete_mamba2"])
def test_set_decay_gives_the_mean_distance(kind: str) -> None:
    mixer = copied(tiny_teacher(), kind)
    distance = torch.tensor([1.0, 2.0, 5.0, 30.0, 200.0, 1e4], dtype=torch.float64)
    set_decay(mixer, distance)
    log_a = mixer.scan_inputs(torch.randn(1, 4, 48)).log_a_BLH[0, 0].double()
    assert torch.allclose(1 / torch.expm1(-log_a), distance, rtol=1e-3)


def test_scaling_the_scan_keeps_the_decay() -> None:
    mixer = tiny_hybrid("mamba2").mixers()[1]
    assert isinstance(mixer, Mamba2Mixer)
    mixer.in_proj.weight.data[-6:] = 0
    u = torch.randn(1, 9, 48)
    before = mixer.scan_inputs(u)
    factor = torch.tensor([0.01, 0.5, 1, 2, 10, 100], dtype=torch.float64)
    with torch.no_grad():
        scale_scan(mixer, factor)
    after = mixer.scan_inputs(u)
    assert torch.allclose(after.log_a_BLH, before.log_a_BLH, rtol=1e-4)
    assert before.w_BLH is not None
    assert after.w_BLH is not None
    assert torch.allclose(after.w_BLH, before.w_BLH * factor.float(), rtol=1e-4)


def test_inverses() -> None:
    values = torch.tensor([-0.2, -0.01, 0.0, 0.03, 1.0, 50.0], dtype=torch.float64)
    assert torch.allclose(torch.nn.functional.silu(inverse_silu(values)), values, atol=1e-9)
    positive = torch.tensor([1e-12, 1e-3, 1.0, 400.0], dtype=torch.float64)
    assert torch.allclose(torch.nn.functional.softplus(inverse_softplus(positive)), positive, rtol=1e-9)


def test_captured_attention_is_the_eager_attention() -> None:
    teacher = tiny_teacher(attn_implementation="eager")
    tokens = torch.randint(0, 256, (2, 70))
    expected = teacher(tokens, output_attentions=True).attentions
    sdpa = tiny_teacher()
    with captured(sdpa, LLAMA, [0, 2], attention=True) as calls:
        sdpa(tokens)
    for layer in (0, 2):
        attended = calls[layer].attended
        assert attended is not None
        for start, rows in attention_rows(attended, rows=32):
            assert torch.allclose(
                rows, expected[layer][:, :, start : start + rows.shape[2], : rows.shape[3]], atol=1e-5
            )


def resolved(text: str, total: int) -> list[int]:
    return list(resolve_layers(text, total))


def test_layers() -> None:
    assert resolved("uniform-15", 30) == list(range(1, 30, 2))
    assert resolved("all", 3) == [0, 1, 2]
    assert resolved("uniform-3", 4) == [1, 2, 3]
    assert resolve_layers((3, 1), 4) == (1, 3)
    with pytest.raises(ValueError, match=r"0\.\.3; got 4"):
        resolve_layers((4,), 4)
    with pytest.raises(ValueError, match="at most 4"):
        resolve_layers("uniform-5", 4)


def test_bias_reaches_values_through_the_convolution() -> None:
    teacher = tiny_teacher(attention_bias=True)
    mixer = copied(teacher, "discrete_mamba2")
    zero = mixer.scan_inputs(torch.zeros(1, 1, 48))
    attention = teacher.model.layers[1].self_attn
    expected = expand_kv(attention.v_proj.bias, attention_shape(teacher.config)).view(6, 8)
    assert torch.allclose(zero.x_BLHP[0, 0], expected)
    assert expected.abs().max() > 0.1
