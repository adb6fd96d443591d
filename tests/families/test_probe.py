"""Families found by probing: right where the family is known, used where it holds, refused where it does not."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ssmorph.convert.calibrate import CalibrationOptions, calibrate
from ssmorph.convert.families import FAMILIES, family_of
from ssmorph.convert.families.probe import probe, tiny_model
from ssmorph.convert.families.probe_check import CheckError, checked
from ssmorph.convert.surgery import MixerChoice
from ssmorph.convert.tiny import strengthen
from ssmorph.stages.artifact import copied_student
from tests.families.tiny import COMMON, GQA, WIDE, family_config, family_teacher

# families without a row of their own
FOUND: dict[str, dict[str, Any]] = {
    "cohere": {**GQA, "logit_scale": 0.5},
    "starcoder2": {**GQA, "sliding_window": 7},
    "exaone4": {**WIDE, "sliding_window": 7, "sliding_window_pattern": 2},
    "glm": {**WIDE, "attention_bias": True},
    "arcee": GQA,
    "helium": {**GQA, "head_dim": 8},
}
REFUSED = {
    "gpt2": ({}, "no attention with q, k, v"),
    "bloom": ({}, "calls no registered attention function"),
    "olmo": ({}, "its config has none of rms_norm_eps"),
    "gpt_oss": ({}, "other lengths"),
    "cohere": ({"use_qk_norm": True}, "no weight that is one vector"),
}
KNOWN = ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "phi", "phi3", "gemma2", "gemma3", "olmo2", "granite"]


def teacher_of(model_type: str) -> Any:
    config = AutoConfig.for_model(model_type, **FOUND[model_type])
    return strengthen(AutoModelForCausalLM.from_config(config)).eval().requires_grad_(False)


@pytest.mark.parametrize("row", KNOWN)
def test_the_probe_finds_what_the_listed_families_say(row: str) -> None:
    config = family_config(row)
    found, spec = probe(config), FAMILIES[config.model_type]
    assert found.shape(config) == spec.shape(config)
    assert found.mixer_norm(config) == spec.mixer_norm(config)
    assert found.logits(config) == spec.logits(config)
    layers = range(config.num_hidden_layers)
    assert [found.window(config, i) for i in layers] == [spec.window(config, i) for i in layers]
    assert [found.rotary(config, i) for i in layers] == [spec.rotary(config, i) for i in layers]
    assert [found.turned(config, i) for i in layers] == [spec.turned(config, i) for i in layers]
    names = ("layers", "mixer", "out", "fused") + (() if spec.fused else ("query", "key", "value"))
    assert all(getattr(found, name) == getattr(spec, name) for name in names)
    normed = hasattr(spec.attention(family_teacher(row), 0), spec.query_norm or " ")
    assert (found.query_norm, found.key_norm) == ((spec.query_norm, spec.key_norm) if normed else (None, None))
    assert found.unit_offset == (spec.unit_offset and normed)


@pytest.mark.parametrize("model_type", FOUND)
def test_an_unlisted_family_is_converted(model_type: str) -> None:
    assert model_type not in FAMILIES
    teacher = teacher_of(model_type)
    spec = family_of(teacher.config)
    checked(teacher, spec)
    student = copied_student(teacher, spec, (1, 3), MixerChoice(kind="mamba2"), 0, own_rest=False)
    x = [torch.randint(0, 256, (2, 48), generator=torch.Generator().manual_seed(i)) for i in range(8)]
    fits = calibrate(teacher, student, spec, x, CalibrationOptions())
    assert all(fit.accepted and fit.error < min(1.0, fit.error_copy) for fit in fits)
    assert student(x[0]).logits.isfinite().all()


def test_what_only_numbers_tell() -> None:
    cohere, exaone, glm = (AutoConfig.for_model(m, **FOUND[m]) for m in ("cohere", "exaone4", "glm"))
    assert family_of(cohere).logits(cohere) == (0.5, None)
    spec, kinds = family_of(exaone), exaone.layer_types
    assert set(kinds) == {"sliding_attention", "full_attention"}
    assert spec.mixer_norm(exaone) is None
    assert spec.query_norm == "q_norm"
    assert [spec.rotary(exaone, i) for i in range(4)] == [float(kind == "sliding_attention") for kind in kinds]
    assert family_of(glm).rotary(glm, 0) == 0.5
    # these two turn neighbouring channels, which the state behind a window does not take back
    assert [family_of(c).turned(c, 0) for c in (cohere, glm, exaone)] == [0, 0, 12]
    assert family_of(glm).shape(glm).qkv_bias
    assert not family_of(glm).shape(glm).out_bias


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_model_that_the_probe_cannot_read(model_type: str) -> None:
    changes, lacks = REFUSED[model_type]
    with pytest.raises(ValueError, match=f"must be a supported family; got '{model_type}': .*{lacks}.*") as caught:
        family_of(AutoConfig.for_model(model_type, **changes))
    assert str(caught.value).endswith("See docs/add-a-family.md.")


@pytest.mark.parametrize(
    ("wrong", "shown"),
    [
        ({"value": "k_proj"}, "does not make what enters"),
        ({"query": "o_proj"}, "query heads have other lengths"),
        ({"query_norm": None}, "query heads have other lengths"),
        ({"out": "q_proj"}, "enters the output projection|input"),
    ],
)
def test_a_wrong_spec_fails_its_checks(wrong: dict[str, Any], shown: str) -> None:
    config = AutoConfig.for_model("exaone4", **{**COMMON, "num_key_value_heads": 6, "head_dim": 8})
    model = tiny_model(config)
    spec = dataclasses.replace(probe(config), **wrong)
    with pytest.raises(CheckError, match=shown):
        checked(model, spec)


def test_one_line_says_what_was_found_and_once(caplog: pytest.LogCaptureFixture) -> None:
    config = AutoConfig.for_model("arcee", **{**GQA, "vocab_size": 100})
    with caplog.at_level(logging.INFO):
        assert family_of(config) is family_of(AutoConfig.for_model("arcee", **{**GQA, "vocab_size": 100}))
    lines = [r.getMessage() for r in caplog.records if "found by probing" in r.getMessage()]
    assert len(lines) == 1
    assert "layers model.layers, mixer self_attn, projections q_proj, k_proj, v_proj, out o_proj" in lines[0]
