"""A window with a state behind it: equal to the window alone at the start, to a dense formula after, and calibrated."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ssmorph.convert.calibrate import CalibrationOptions, calibrate
from ssmorph.convert.families import family_of
from ssmorph.convert.mixers import MIXERS, WindowedMixer, has_window, keeps_attention
from ssmorph.convert.modeling import hybrid_of
from ssmorph.convert.plan import cache_bytes
from ssmorph.convert.surgery import MixerChoice, start_mixer
from ssmorph.convert.windowfit import attended, gate_errors, prototypes
from ssmorph.errors import UserError
from ssmorph.kernels.common.rope import turned, turned_back
from ssmorph.stages.controls import windowed
from ssmorph.stages.decode import filled_cache
from ssmorph.stages.planning import plan_of
from ssmorph.stages.recipe import build
from ssmorph.stages.silence import silenced
from ssmorph.stages.student_config import HEADS, WINDOWED
from tests.families.hybrids import WITH_WINDOW, close, tokens
from tests.families.tiny import ROWS, family_config, family_teacher
from tests.models import tiny_hybrid, tiny_teacher

CHOICE = MixerChoice(kind="windowed_mamba2", window=9, sinks=2, state=6)


def fresh(teacher: Any, layers: tuple[int, ...] = (1, 3), choice: MixerChoice = CHOICE) -> Any:
    spec = family_of(teacher.config)
    return hybrid_of(teacher, {i: start_mixer(teacher, spec, i, choice) for i in layers}, "test")


@torch.no_grad()
@pytest.mark.parametrize("row", WITH_WINDOW)
def test_it_starts_as_the_window_alone(row: str) -> None:
    teacher = family_teacher(row)
    with windowed(teacher, family_of(teacher.config), [1, 3], CHOICE.window, CHOICE.sinks):
        expected = teacher(tokens(2, 40)).logits
    assert close(fresh(teacher)(tokens(2, 40)).logits, expected)
    # the layers of this Gemma 3 see 7 tokens by themselves
    assert close(teacher(tokens(2, 40)).logits, expected) == (row == "gemma3")


def dense(mixer: WindowedMixer, q: Tensor, k: Tensor, v: Tensor, scale: float, tables: Any) -> Tensor:
    """The module's formula with a matrix for every head, [B, L, H, P]."""
    assert mixer.state is not None
    s, length, repeat = mixer.state, q.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    q_far, k_far = q, k
    if tables is not None:
        # as they are before RoPE, and each key as far back as the window is long
        gone = mixer.shape.window - mixer.shape.sinks
        q_far, k_far = turned_back(q, tables), turned_back(k, tables)
        angle = torch.atan2(tables[1][:, 1:2], tables[0][:, 1:2]) if length > 1 else torch.zeros_like(tables[0])
        k_far = turned(k_far, torch.cos(gone * angle), -torch.sin(gone * angle))
    row, column = torch.arange(length)[:, None], torch.arange(length)
    left = column <= row - (mixer.shape.window - mixer.shape.sinks)
    near = (column <= row) & (~left | (column < mixer.shape.sinks))
    far = left & (column >= mixer.shape.sinks)
    weights = torch.exp(scale * q @ k.transpose(-1, -2)) * near
    key_map, key_bias = (t.repeat_interleave(repeat, 0) for t in (s.key_map, s.key_bias))
    dt_map, dt_bias, A = (t.repeat_interleave(repeat, 0) for t in (s.dt_map, s.dt_bias, s.A_log.exp()))
    B = (torch.einsum("bhlp,hnp->bhln", k_far, key_map) + key_bias[:, None]).softmax(-1)
    C = torch.exp(torch.einsum("bhlp,hnp->bhln", q_far, s.query_map) + s.query_bias[:, None]) * s.gate[:, None, None]
    dt = torch.nn.functional.softplus(torch.einsum("bhlp,hp->bhl", k_far, dt_map) + dt_bias[:, None]) * (
        column >= mixer.shape.sinks
    )
    # a token enters when it leaves the window, and decays with every one that enters after it
    passed = (dt * A[:, None]).cumsum(-1)
    gone = mixer.shape.window - mixer.shape.sinks
    now = torch.cat([passed.new_zeros(*passed.shape[:2], gone), passed[..., : length - gone]], -1)
    decay = torch.exp((passed[..., None, :] - now[..., :, None]).clamp_max(0))
    weights = weights + (C @ B.transpose(-1, -2)) * decay * dt[..., None, :] * far
    return (weights @ v / weights.sum(-1, keepdim=True)).transpose(1, 2)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 7, 8, 9, 50])
@pytest.mark.parametrize("row", ["llama", "qwen3", "phi"])
@pytest.mark.parametrize("back", [True, False])
def test_it_is_the_formula(row: str, length: int, back: bool) -> None:
    teacher = family_teacher(row)
    mixer = tiny_hybrid("windowed_mamba2", (1,), teacher).mixers()[1]
    assert mixer.shape.turned == mixer.shape.head_dim // (2 if row == "phi" else 1)
    if not back:
        # what configs say nothing of it mean
        mixer.shape = dataclasses.replace(mixer.shape, turned=0)
    hidden = torch.randn(2, length, mixer.shape.hidden, generator=torch.Generator().manual_seed(0))
    rope = teacher.model.rotary_emb(hidden, torch.arange(length)[None])
    q, k, v, scores = attended(mixer, hidden, {"position_embeddings": rope})
    own = mixer.features(hidden, position_embeddings=rope).unflatten(-1, (mixer.shape.heads, -1))
    assert close(own, dense(mixer, q, k, v, scores.scale, rope if back else None))


@torch.no_grad()
@pytest.mark.parametrize("row", [row for row in ROWS if family_of(family_config(row)).attention_function])
def test_the_state_knows_no_position(row: str) -> None:
    teacher = family_teacher(row)
    hybrid = tiny_hybrid("windowed_mamba2", (1,), teacher)

    def moves() -> bool:
        here, there = (hybrid(tokens(1, 40), position_ids=torch.arange(first, first + 40)[None]) for first in (0, 57))
        return not close(here.logits, there.logits)

    mixer = hybrid.mixers()[1]
    assert not moves()
    turned, mixer.shape = mixer.shape.turned, dataclasses.replace(mixer.shape, turned=0)
    assert moves() == (turned > 0)


@pytest.mark.parametrize(
    "name", ["key_map", "key_bias", "query_map", "query_bias", "dt_map", "dt_bias", "A_log", "gate"]
)
def test_every_part_of_the_state_learns(name: str) -> None:
    hybrid = tiny_hybrid("windowed_mamba2").requires_grad_(True)
    hybrid(tokens(1, 30)).logits.square().mean().backward()
    assert all(getattr(m.state, name).grad.abs().max() > 0 for m in hybrid.mixers().values())


def test_a_shut_gate_can_open() -> None:
    hybrid = tiny_hybrid("windowed_mamba2").requires_grad_(True)
    for mixer in hybrid.mixers().values():
        mixer.state.gate.data.zero_()
    hybrid(tokens(1, 30)).logits.square().mean().backward()
    assert all(m.state.gate.grad.abs().max() > 0 for m in hybrid.mixers().values())


@torch.no_grad()
def test_a_prototype_far_above_the_window_overflows_nothing() -> None:
    hybrid = tiny_hybrid("windowed_mamba2")
    for mixer in hybrid.mixers().values():
        mixer.state.query_bias.fill_(300)
    whole = hybrid(tokens(1, 40)).logits
    assert whole.isfinite().all()
    for mixer in hybrid.mixers().values():
        mixer.state.query_bias.fill_(400)
    # both drown the window, and prototypes are weighed against each other alone
    assert close(hybrid(tokens(1, 40)).logits[:, 10:], whole[:, 10:])


def test_prototypes_are_the_centres_of_what_is_apart() -> None:
    generator = torch.Generator().manual_seed(3)
    centres = 10 * torch.randn(1, 4, 6, generator=generator)
    keys = (centres[:, :, None] + 0.1 * torch.randn(1, 4, 50, 6, generator=generator)).flatten(1, 2)
    found, spread = prototypes(keys, 8)
    assert torch.cdist(centres[0], found[0]).amin(1).max() < 0.5
    assert float(spread) < 1
    assert torch.equal(found, prototypes(keys, 8)[0])
    # more prototypes than keys
    assert prototypes(keys[:, :3], 8)[0].isfinite().all()


def test_errors_of_gates_are_those_of_their_outputs() -> None:
    generator = torch.Generator().manual_seed(4)
    near, target = (torch.randn(2, 3, 40, 5, generator=generator) for _ in range(2))
    mass, far = 1 + torch.rand(2, 3, 40, generator=generator), torch.randn(2, 3, 40, 6, generator=generator)
    far[..., -1].abs_()
    gates = torch.tensor([0.0, 0.25, 3.0])
    own = [(near + g * far[..., :-1]) / (mass + g * far[..., -1]).unsqueeze(-1) for g in gates]
    expected = torch.stack([(o - target).double().square().sum((0, 2, 3)) for o in own])
    torch.testing.assert_close(gate_errors(near, mass, far, target, gates), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["windowed_mamba2", "window"])
def test_calibration_wins_over_the_window_it_starts_from(kind: str) -> None:
    teacher = tiny_teacher()
    student = fresh(teacher, choice=MixerChoice(kind=kind, window=9, sinks=2, state=16))
    windows = [tokens(2, 64, seed) for seed in range(8)]
    fits = calibrate(teacher, student, family_of(teacher.config), windows, CalibrationOptions())
    assert all(fit.accepted and fit.error < fit.error_copy for fit in fits)
    text = tokens(2, 64, seed=99)
    with torch.no_grad():
        own = student(text).logits
        with silenced(student):
            alone = student(text).logits
    assert (own - alone).abs().max() > 1e-2 if kind == "windowed_mamba2" else torch.equal(own, alone)


@pytest.mark.parametrize("kind", ["windowed_mamba2", "window"])
def test_the_cache_is_as_large_as_planned(kind: str) -> None:
    hybrid = fresh(tiny_teacher(), choice=MixerChoice(kind=kind, window=9, sinks=2, state=16))
    shape = hybrid.mixers()[1].shape
    for cache in (filled_cache(hybrid, 40), hybrid(tokens(1, 40)).past_key_values):
        floats = [t for t in cache.layers[1].tensors() if t.is_floating_point()]
        assert sum(t.numel() * t.element_size() for t in floats) == cache_bytes(shape, 4)


def test_falcon_has_no_function_to_ask(tmp_path: Path) -> None:
    teacher = family_teacher("falcon-7b")
    with pytest.raises(UserError, match=r"registered attention functions.*falcon"):
        start_mixer(teacher, family_of(teacher.config), 1, CHOICE)
    # nor has the probe for heads, which comes before surgery
    teacher.save_pretrained(tmp_path)
    recipe = {"teacher": {"source": str(tmp_path)}, "run_dir": "runs/x", "stages": [{"kind": "surgery"}],
              "student": {"mixer": "windowed_mamba2", "heads": "retrieval-1", "layers": [1]}}  # fmt: skip
    with pytest.raises(UserError, match=r"registered attention functions.*falcon"):
        plan_of(build(recipe))


def test_lists_of_kinds_agree_with_the_mixers() -> None:
    assert {kind for kind in MIXERS if has_window(kind)} == {*WINDOWED}
    assert {kind for kind in MIXERS if keeps_attention(kind)} == {HEADS, *WINDOWED}


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"student": {"mixer": "window", "window": 4}}, "student.window: must hold more than its sinks"),
        ({"student": {"mixer": "windowed_mamba2", "state": 0}}, "student.state: must be positive"),
        ({"student": {"mixer": "window"}, "stages": [{"kind": "surgery"}, {"kind": "mixing"}]}, "no mixing matrix"),
        ({"student": {"mixer": "window"}, "stages": [{"kind": "surgery", "init": "random"}]}, "stages.surgery.init"),
    ],
)
def test_recipes_that_cannot_be(change: dict[str, Any], rule: str) -> None:
    whole = {"teacher": {"source": "x"}, "run_dir": "runs/x", "stages": [{"kind": "surgery"}], **change}
    with pytest.raises(UserError, match=re.escape(rule)):
        build(whole)
