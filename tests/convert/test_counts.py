"""Counts from configs alone against real models and students of all families, and against published totals."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from ssmorph.convert.counts import expert_share, head_parameters, mixer_parameters, parameters, teacher_counts
from ssmorph.convert.families import attention_shape, family_of
from ssmorph.convert.modeling import hybrid_of
from ssmorph.convert.surgery import shape_of, start_mixer
from tests.families.hybrids import EACH
from tests.families.tiny import ROWS, family_config, family_teacher
from tests.models import choice_of

# with kept heads: none, some, all
LAYERS = (0, 1, 2)


def matmuls_of_one_token(teacher: Any) -> int:
    """Multiplications of all linear layers outside of experts, counted while one token runs."""
    seen = 0

    def count(module: nn.Module, _args: tuple, output: torch.Tensor) -> None:
        nonlocal seen
        seen += cast(nn.Linear, module).weight.numel() * (output.numel() // output.shape[-1])

    handles = [m.register_forward_hook(count) for m in teacher.modules() if isinstance(m, nn.Linear)]
    teacher(torch.tensor([[1]]), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(("row", "kind"), EACH)
def test_counts_are_those_of_the_built_models(row: str, kind: str) -> None:
    config, teacher = family_config(row), family_teacher(row)
    spec = family_of(config)
    counts = teacher_counts(config, spec)
    assert counts.total == parameters(teacher)
    choice = choice_of(kind)
    student = hybrid_of(teacher, {i: start_mixer(teacher, spec, i, choice) for i in LAYERS}, "test")
    added = 0
    for i in LAYERS:
        own = choice.at(i)
        shape, head = shape_of(attention_shape(config), own), head_parameters(spec, config)
        made = mixer_parameters(own.kind, shape, counts.attention[i], head)
        added += made - counts.attention[i]
    assert counts.total + added == parameters(student)
    # Phi's head has biases
    assert counts.head // config.vocab_size in (config.hidden_size, config.hidden_size + 1)


@pytest.mark.parametrize("row", [row for row in ROWS if "mix" not in row and "moe" not in row])
def test_every_parameter_of_a_layer_without_experts_is_active(row: str) -> None:
    config = family_config(row)
    counts = teacher_counts(config, family_of(config))
    assert counts.active == counts.layers
    # norms and biases multiply no matrix
    assert 0 <= counts.active + counts.head - matmuls_of_one_token(family_teacher(row)) < 0.05 * counts.active


@pytest.mark.parametrize(("row", "width"), [("mixtral", 64), ("qwen3_moe", 32)])
def test_a_token_passes_two_of_three_experts(row: str, width: int) -> None:
    config = family_config(row)
    counts = teacher_counts(config, family_of(config))
    assert expert_share(config) == 2 / 3
    # one expert of three matrices in each of four layers is left out
    assert counts.layers - counts.active == 4 * 3 * 48 * width


def test_mixtral_8x7b_has_its_published_size() -> None:
    # 46.7B parameters, 12.9B of them for a token (the announcement and arXiv 2401.04088); the defaults are its config
    config = AutoConfig.for_model("mixtral")
    counts = teacher_counts(config, family_of(config))
    assert counts.total / 1e9 == pytest.approx(46.7, abs=0.05)
    assert (counts.active + 2 * counts.head) / 1e9 == pytest.approx(12.9, abs=0.05)
