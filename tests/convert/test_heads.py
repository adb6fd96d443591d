"""Kept heads beside Mamba-2: all kept are the teacher, some are exact, what nobody reads is not cached; calibration."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ssmorph.convert.calibrate import CalibrationOptions, calibrate
from ssmorph.convert.capture import captured
from ssmorph.convert.families import family_of
from ssmorph.convert.mixers import HeadsMixer
from ssmorph.convert.mixers.mamba2 import Mamba2Mixer
from ssmorph.convert.modeling import hybrid_of
from ssmorph.convert.plan import cache_bytes, kept_bytes_per_token
from ssmorph.convert.surgery import MixerChoice, start_mixer
from ssmorph.errors import UserError
from ssmorph.stages.decode import filled_cache
from ssmorph.stages.silence import silenced
from tests.families.hybrids import WITH_HEADS, close, tokens
from tests.families.tiny import ROWS, family_teacher
from tests.models import tiny_hybrid, tiny_teacher

ALL = tuple((layer, head) for layer in (1, 3) for head in range(6))
# heads 0 to 2 read the first key/value head, 3 to 5 the second
SOME = ((1, 1), (3, 0), (3, 5))


def fresh(teacher: Any, kept: tuple[tuple[int, int], ...], layers: tuple[int, ...] = (1, 3)) -> Any:
    spec = family_of(teacher.config)
    choice = MixerChoice(kind="mamba2_heads", kept=kept)
    torch.manual_seed(0)
    return hybrid_of(teacher, {i: start_mixer(teacher, spec, i, choice) for i in layers}, "test")


@torch.no_grad()
@pytest.mark.parametrize("row", WITH_HEADS)
def test_with_every_head_kept_it_is_the_teacher(row: str) -> None:
    teacher = family_teacher(row)
    hybrid, x = fresh(teacher, ALL), tokens(2, 40)
    assert all(isinstance(m, HeadsMixer) and m.scan is None for m in hybrid.mixers().values())
    expected = teacher(x).logits
    assert close(hybrid(x).logits, expected)
    cache = hybrid(x[:, :30]).past_key_values
    assert close(hybrid(x[:, 30:], past_key_values=cache).logits, expected[:, 30:])


@torch.no_grad()
def test_with_no_head_kept_it_is_mamba2() -> None:
    teacher = tiny_teacher()
    hybrid = fresh(teacher, ((3, 2),))
    torch.manual_seed(0)
    plain = start_mixer(teacher, family_of(teacher.config), 1, MixerChoice(kind="mamba2"))
    mixer = hybrid.mixers()[1]
    assert type(mixer) is type(plain) is Mamba2Mixer
    assert all(torch.equal(a, b) for a, b in zip(mixer.parameters(), plain.parameters(), strict=True))


@torch.no_grad()
@pytest.mark.parametrize("row", [row for row in ROWS if "falcon" not in row])
def test_each_head_answers_in_its_own_place(row: str) -> None:
    """Kept heads as the teacher's, the others as the whole layer's Mamba-2 has them."""
    teacher = family_teacher(row)
    spec, kept = family_of(teacher.config), (1, 4)
    torch.manual_seed(0)
    whole = start_mixer(teacher, spec, 1, MixerChoice(kind="mamba2"))
    assert isinstance(whole, Mamba2Mixer)
    torch.manual_seed(0)
    mixer = start_mixer(teacher, spec, 1, MixerChoice(kind="mamba2_heads", kept=tuple((1, h) for h in kept)))
    assert isinstance(mixer, HeadsMixer)
    with captured(teacher, spec, [1], attention=False) as calls:
        teacher(tokens(2, 30))
    call = calls[1]
    others = {k: v for k, v in call.kwargs.items() if k not in ("attention_mask", "position_ids")}
    own = mixer.features(call.input_BLD, **others).unflatten(-1, (6, -1))
    taught, scanned = (t.unflatten(-1, (6, -1)) for t in (call.heads_BLE, whole.features(call.input_BLD)))
    for head in range(6):
        assert close(own[:, :, head], (taught if head in kept else scanned)[:, :, head])


@pytest.mark.parametrize(("row", "heads"), [("llama", (2, 1)), ("olmo2", (6, 2))])
def test_only_heads_that_are_read_are_projected(row: str, heads: tuple[int, int]) -> None:
    """OLMo 2 norms all heads together."""
    attention = fresh(family_teacher(row), ((1, 3), (1, 5))).mixers()[1].attention
    rows = [p.weight.shape[0] for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
    assert rows == [8 * heads[0], 8 * heads[1], 8 * heads[1]]
    assert attention.q_proj.out_features == rows[0]


@torch.no_grad()
def test_only_keys_that_are_read_are_cached() -> None:
    hybrid = fresh(tiny_teacher(), SOME)
    for cache in (filled_cache(hybrid, 40), hybrid(tokens(1, 40)).past_key_values):
        assert [cache.layers[i].held.k_BGSP.shape for i in (1, 3)] == [(1, 1, 40, 8), (1, 2, 40, 8)]
        for i in (1, 3):
            shape = hybrid.mixers()[i].shape
            held = sum(t.numel() * t.element_size() for t in cache.layers[i].tensors())
            assert held == cache_bytes(shape, 4) + 40 * kept_bytes_per_token(shape, 4)


@torch.no_grad()
def test_a_head_keeps_no_more_than_it_sees() -> None:
    hybrid = fresh(family_teacher("mistral"), SOME)
    for cache in (filled_cache(hybrid, 40), hybrid(tokens(1, 40)).past_key_values):
        assert cache.layers[1].held.k_BGSP.shape[2] == 6


@pytest.mark.parametrize("decay", ["output", "distance"])
def test_calibration_leaves_less_than_the_copy(decay: Any) -> None:
    teacher = tiny_teacher()
    windows = [tokens(2, 64, seed) for seed in range(8)]
    options = CalibrationOptions(decay=decay)
    errors = {}
    for name, kept in {"none": (), "some": SOME}.items():
        student = fresh(teacher, kept)
        fits = calibrate(teacher, student, family_of(teacher.config), windows, options)
        assert all(fit.accepted and fit.error < fit.error_copy for fit in fits)
        errors[name] = [fit.error for fit in fits]
    assert all(some < none for some, none in zip(errors["some"], errors["none"], strict=True))


def test_calibration_leaves_a_layer_that_is_exact() -> None:
    teacher = tiny_teacher()
    student = fresh(teacher, ALL, layers=(1,))
    (fit,) = calibrate(teacher, student, family_of(teacher.config), [tokens(2, 64, s) for s in range(4)],
                       CalibrationOptions())  # fmt: skip
    # moments are summed from products in float32
    assert fit.error_copy < 1e-6
    with torch.no_grad():
        assert close(student(tokens(2, 40)).logits, teacher(tokens(2, 40)).logits)


@torch.no_grad()
def test_silenced_states_leave_kept_heads() -> None:
    teacher, x = tiny_teacher(), tokens(2, 40)
    exact, some = fresh(teacher, ALL), tiny_hybrid("mamba2_heads")
    with silenced(exact), silenced(some):
        assert close(exact(x).logits, teacher(x).logits)
        quiet = some(x).logits
    assert (quiet - some(x).logits).abs().max() > 1e-2


def test_every_part_learns() -> None:
    hybrid = tiny_hybrid("mamba2_heads").requires_grad_(True)
    hybrid(tokens(1, 30)).logits.square().mean().backward()
    mixer = hybrid.mixers()[1]
    assert isinstance(mixer, HeadsMixer)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in mixer.parameters())


def test_falcon_has_no_function_to_ask() -> None:
    teacher = family_teacher("falcon-7b")
    with pytest.raises(UserError, match=r"registered attention functions.*falcon"):
        start_mixer(teacher, family_of(teacher.config), 1, MixerChoice(kind="mamba2_heads", kept=((1, 0),)))
