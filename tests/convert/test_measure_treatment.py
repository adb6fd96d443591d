"""What approximations and drops cost: nothing where a feature does nothing, and by hand's reckoning where it does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ssmorph.convert import measure_treatment
from ssmorph.convert.capture import captured
from ssmorph.convert.families import family_of
from ssmorph.convert.measure_treatment import CAP, NORM, ROPE, WINDOW, Cost, measure
from ssmorph.convert.tiny import strengthen
from tests.families.tiny import ROWS, family_teacher

LAYERS = [0, 1, 2, 3]
WINDOWS_WL = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))


def model_of(row: str, **changes: Any) -> Any:
    model_type, values = ROWS[row]
    config = AutoConfig.for_model(model_type, **{**values, **changes})
    return strengthen(AutoModelForCausalLM.from_config(config)).eval().requires_grad_(False)


def cost_of(model: Any, feature: str, layers: list[int] = LAYERS) -> Any:
    return measure(model, family_of(model.config), layers, [feature], WINDOWS_WL)[feature]


def test_a_soft_cap_costs_by_how_far_it_bends_scores() -> None:
    assert cost_of(model_of("gemma2", attn_logit_softcapping=1e6), CAP).worst()[1] < 1e-9
    mild, hard = (cost_of(model_of("gemma2", attn_logit_softcapping=cap), CAP) for cap in (5.0, 0.5))
    assert 1e-6 < mild.median() < hard.median()


def test_a_window_costs_in_the_layers_that_slide_and_is_unseen_in_shorter_text() -> None:
    short = cost_of(model_of("gemma2", sliding_window=7), WINDOW)
    assert sorted(short.errors) == [0, 2]
    assert short.median() > cost_of(model_of("gemma2", sliding_window=19), WINDOW).median() > 1e-4
    assert cost_of(model_of("gemma2", sliding_window=20), WINDOW) == "no window is shorter than the 20 tokens seen"


@pytest.mark.parametrize("row", ["llama", "gemma2", "gemma3", "gpt_neox", "falcon-7b"])
def test_rope_that_turns_nothing_costs_nothing(row: str) -> None:
    model = family_teacher(row)
    assert min(cost_of(model, ROPE).errors.values()) > 1e-4
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq"):
            buffer.zero_()
    assert cost_of(model, ROPE).worst()[1] < 1e-9


def test_ropes_cost_is_that_of_plain_attention_by_hand() -> None:
    model = model_of("llama", num_key_value_heads=6, tie_word_embeddings=False)
    spec = family_of(model.config)
    with captured(model, spec, [2], attention=False) as calls:
        model(WINDOWS_WL)
    attention, call = spec.attention(model, 2), calls[2]
    q, k, v = (
        getattr(attention, f"{name}_proj")(call.input_BLD).unflatten(-1, (6, 8)).transpose(1, 2) for name in "qkv"
    )
    scores = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(torch.ones(20, 20).triu(1).bool(), -torch.inf)
    plain = attention.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    expected = (plain - call.output_BLD).square().sum() / call.output_BLD.square().sum()
    assert cost_of(model, ROPE, [2]).errors[2] == pytest.approx(float(expected), rel=1e-4)


def test_layers_without_rope_are_left_out() -> None:
    assert sorted(cost_of(family_teacher("smollm3"), ROPE).errors) == [0, 1, 2]
    assert cost_of(family_teacher("smollm3"), ROPE, [3]) == "no converted layer has it"


@pytest.mark.parametrize("row", ["gemma3", "qwen3", "phi-normed", "stablelm-normed"])
def test_norms_of_queries_and_keys_cost_what_tokens_differ_in_size(row: str) -> None:
    # by a bias alone every token's rows have the size that the folded factor divides by
    model = model_of(row, attention_bias=True) if row in ("gemma3", "qwen3") else model_of(row, use_qkv_bias=True)
    assert min(cost_of(model, NORM).errors.values()) > 1e-5
    for name, parameter in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            parameter.zero_()
        if name.endswith(("q_proj.bias", "k_proj.bias")):
            parameter.normal_(std=3)
    assert cost_of(model, NORM).worst()[1] < 1e-6


def test_norms_behind_fused_projections_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cost_of(family_teacher("phi3"), NORM) == "qkv_proj makes queries, keys and values at once"
    monkeypatch.setattr(measure_treatment.inspect, "signature", lambda _f: type("S", (), {"parameters": {}}))
    assert cost_of(family_teacher("llama"), ROPE) == "its attention is not given RoPE's cos and sin"


def test_the_teacher_is_left_as_it_was() -> None:
    model = family_teacher("gemma3")
    before = model(WINDOWS_WL).logits
    measured = measure(model, family_of(model.config), LAYERS, [NORM, ROPE, WINDOW, "softmax"], WINDOWS_WL)
    assert list(measured) == [NORM, ROPE, WINDOW]
    assert torch.equal(model(WINDOWS_WL).logits, before)


def test_the_worst_layer_is_named() -> None:
    cost = Cost({1: 0.2, 3: 0.5, 5: 0.1})
    assert (cost.median(), cost.worst()) == (0.2, (3, 0.5))
