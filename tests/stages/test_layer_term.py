"""The layer term of the logits stage: whose inputs the blocks get, and MaTVLM's distance by its formula."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from ssmorph.convert.families import family_of
from ssmorph.stages.config import LogitsStage
from ssmorph.stages.hidden import BlockCall, block_calls
from ssmorph.stages.logits import layer_term
from tests.models import tiny_hybrid, tiny_teacher


def calls(**stage: Any) -> tuple[Any, LogitsStage, dict[int, BlockCall], dict[int, BlockCall]]:
    teacher = tiny_teacher()
    ctx: Any = SimpleNamespace(student=tiny_hybrid(teacher=teacher), teacher=teacher, spec=family_of(teacher.config))
    for mixer in ctx.student.mixers().values():
        mixer.requires_grad_(True)
    tokens = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(3))
    with block_calls(ctx, ctx.teacher, [1, 3]) as taught, torch.no_grad():
        teacher.base_model(tokens, use_cache=False)
    with block_calls(ctx, ctx.student, [1, 3]) as own:
        ctx.student.base_model(tokens, use_cache=False)
    return ctx, LogitsStage(layer_weight=1.0, **stage), own, taught


def test_the_teachers_inputs_keep_layers_apart() -> None:
    for inputs, apart in (("teacher", True), ("student", False)):
        ctx, stage, own, taught = calls(layer_inputs=inputs)
        layer_term(ctx, stage, own, {3: taught[3]}).backward()
        first, last = (ctx.student.mixers()[i].in_proj.weight.grad for i in (1, 3))
        assert last.abs().max() > 0
        assert (first is None) == apart


def test_the_first_converted_block_gets_the_same_inputs_either_way() -> None:
    values = []
    for inputs in ("teacher", "student"):
        ctx, stage, own, taught = calls(layer_inputs=inputs)
        values.append(layer_term(ctx, stage, own, {1: taught[1]}))
    torch.testing.assert_close(*values)


def test_frobenius_is_the_sum_of_whole_windows_norms_per_token() -> None:
    ctx, stage, own, taught = calls(layer_loss="frobenius")
    gaps = [torch.norm(own[i].left_BLD[b] - taught[i].left_BLD[b]) for i in (1, 3) for b in (0, 1)]
    torch.testing.assert_close(layer_term(ctx, stage, own, taught), torch.stack(gaps).sum() / 2 / 12)


def test_the_same_blocks_are_at_no_distance() -> None:
    for loss in ("l2", "frobenius"):
        ctx, stage, _, taught = calls(layer_loss=loss)
        assert layer_term(ctx, stage, taught, taught) == 0
