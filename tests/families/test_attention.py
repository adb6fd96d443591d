"""What is captured of every family's attention, and what surgery reads, against its eager attention's own matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ssmorph.convert.capture import OWN, attention_rows, captured, layer_kwargs
from ssmorph.convert.families import FAMILIES, family_of
from ssmorph.convert.modeling import hybrid_of
from ssmorph.convert.surgery import expand_kv
from tests.families.tiny import ROWS, family_teacher

LENGTH = 24


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(0))


def test_every_family_has_a_row() -> None:
    assert {model_type for model_type, _ in ROWS.values()} == set(FAMILIES)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("row", ROWS)
def test_captured_rows_are_the_eager_attention(row: str, padded: bool) -> None:
    teacher = family_teacher(row, attn_implementation="eager")
    spec, layers = family_of(teacher.config), [0, 1, 2, 3]
    x, mask = tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    if padded:
        mask[0, :9] = 0
    expected = teacher(x, attention_mask=mask, output_attentions=True, use_cache=False).attentions
    # Falcon's eager attention is another class
    other = family_teacher(row)
    for model in (teacher, other):
        with captured(model, spec, layers, attention=True) as calls:
            model(x, attention_mask=mask, use_cache=False)
        for layer in layers:
            attended = calls[layer].attended
            assert attended is not None
            own = torch.zeros_like(expected[layer])
            for start, rows in attention_rows(attended, rows=10):
                own[:, :, start : start + rows.shape[2], : rows.shape[3]] = rows
            real = mask.bool()[:, None, :, None]
            assert ((own - expected[layer]) * real).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("row", ROWS)
def test_projections_and_captured_attention_make_the_output(row: str) -> None:
    """A V O from what surgery copies: values, their heads and groups, the output projection; the lengths of q and k."""
    teacher = family_teacher(row)
    spec, shape = family_of(teacher.config), family_of(teacher.config).shape(teacher.config)
    with captured(teacher, spec, [0, 3], attention=True) as calls:
        teacher(tokens(2, LENGTH), use_cache=False)
    for layer, call in calls.items():
        attention = spec.attention(teacher, layer)
        parts = spec.projections(attention, teacher.config)
        value = torch.nn.functional.linear(
            call.input_BLD,
            expand_kv(parts.value.weight, shape),
            None if parts.value.bias is None else expand_kv(parts.value.bias, shape),
        ).unflatten(-1, (shape.heads, shape.head_dim))
        assert call.attended is not None
        blocks = [rows for _, rows in attention_rows(call.attended)]
        heads = torch.cat([torch.einsum("bhts,bshp->bthp", A, value[:, : A.shape[3]]) for A in blocks], 1)
        torch.testing.assert_close(heads.flatten(-2), call.heads_BLE, rtol=1e-4, atol=1e-5)
        output = attention.get_submodule(spec.out)(heads.flatten(-2))
        torch.testing.assert_close(output, call.output_BLD, rtol=1e-4, atol=1e-5)
        if getattr(attention, spec.query_norm or "", None) is None:
            for part, seen in ((parts.query, call.attended.q_BHLP), (parts.key, call.attended.k_BGLP)):
                own = torch.nn.functional.linear(call.input_BLD, part.weight, part.bias)
                # RoPE turns pairs of channels and leaves a head's length
                own = own.unflatten(-1, (-1, shape.head_dim)).norm(dim=-1).transpose(1, 2)
                own = own.repeat_interleave(seen.shape[1] // own.shape[1], dim=1)
                torch.testing.assert_close(own, seen.norm(dim=-1), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("row", ROWS)
def test_zero_layers_converted_is_the_teacher_bit_for_bit(row: str) -> None:
    teacher = family_teacher(row)
    student = hybrid_of(teacher, {}, "test")
    x = tokens(2, 30)
    assert torch.equal(student(x).logits, teacher(x).logits)


def same(one: Any, other: Any) -> bool:
    """Whether two arguments are equal: tensors, tuples of them, or what has an equality of its own."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@torch.no_grad()
@pytest.mark.parametrize("choice", [{}, {"attn_implementation": "eager"}], ids=["default", "eager"])
@pytest.mark.parametrize("row", ROWS)
def test_layers_get_the_same_arguments_without_being_run(row: str, choice: dict[str, str]) -> None:
    teacher, x = family_teacher(row, **choice), tokens(2, LENGTH)
    layers = family_of(teacher.config).decoder_layers(teacher)
    logits, found = teacher(x).logits, layer_kwargs(teacher, family_of(teacher.config), x)
    seen: dict[Any, dict[str, Any]] = {}
    for layer in layers:
        layer.register_forward_pre_hook(lambda m, _args, kwargs: seen.update({m: kwargs}), with_kwargs=True)
    assert torch.equal(teacher(x, use_cache=False).logits, logits)
    for layer, kwargs in zip(layers, found, strict=True):
        expected = {name: value for name, value in seen[layer].items() if name not in OWN}
        assert kwargs.keys() == expected.keys()
        assert all(same(kwargs[name], expected[name]) for name in kwargs)


@torch.no_grad()
def test_a_forward_that_a_layer_has_of_its_own_is_given_back() -> None:
    teacher = family_teacher("llama")
    spec = family_of(teacher.config)
    layer, other, *_ = spec.decoder_layers(teacher)
    runs: list[int] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        runs.append(1)
        return type(layer).forward(layer, *args, **kwargs)

    layer.forward = forward
    layer_kwargs(teacher, spec, tokens(1, 8))
    assert vars(layer)["forward"] is forward
    assert "forward" not in vars(other)
    assert len(runs) == 1
