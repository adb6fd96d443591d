"""Key/value heads kept whole beside a window with a state: exact, in their own places, cached as long as the text."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ssmorph.convert.calibrate import CalibrationOptions, calibrate
from ssmorph.convert.capture import captured
from ssmorph.convert.families import family_of
from ssmorph.convert.mixers import WindowedMixer
from ssmorph.convert.modeling import hybrid_of
from ssmorph.convert.plan import cache_bytes, kept_bytes_per_token
from ssmorph.convert.surgery import MixerChoice, start_mixer
from ssmorph.stages.controls import equal_window
from ssmorph.stages.decode import filled_cache
from ssmorph.stages.silence import silenced
from tests.families.hybrids import WITH_WINDOW, close, tokens
from tests.families.tiny import family_teacher
from tests.models import tiny_teacher

ALL = tuple((layer, head) for layer in (1, 3) for head in range(6))
# one of the three heads of a key/value head
ONE = ((1, 1), (3, 5))


def choice(kept: tuple[tuple[int, int], ...], kind: str = "windowed_mamba2") -> MixerChoice:
    return MixerChoice(kind=kind, window=9, sinks=2, state=16, kept=kept)


def fresh(teacher: Any, kept: tuple[tuple[int, int], ...], kind: str = "windowed_mamba2") -> Any:
    spec = family_of(teacher.config)
    return hybrid_of(teacher, {i: start_mixer(teacher, spec, i, choice(kept, kind)) for i in (1, 3)}, "test")


@torch.no_grad()
@pytest.mark.parametrize("row", WITH_WINDOW)
def test_with_every_head_kept_it_is_the_teacher(row: str) -> None:
    teacher = family_teacher(row)
    hybrid, x = fresh(teacher, ALL), tokens(2, 40)
    assert all(m.state is None for m in hybrid.mixers().values())
    expected = teacher(x).logits
    assert close(hybrid(x).logits, expected)
    cache = hybrid(x[:, :30]).past_key_values
    assert close(hybrid(x[:, 30:], past_key_values=cache).logits, expected[:, 30:])


@torch.no_grad()
@pytest.mark.parametrize("row", ["llama", "gemma2", "gpt_neox"])
def test_each_head_answers_in_its_own_place(row: str) -> None:
    """Kept heads as the teacher's, with all that share their keys; the others as window and state have them."""
    teacher = family_teacher(row)
    spec = family_of(teacher.config)
    plain, mixer = (start_mixer(teacher, spec, 1, choice(kept)) for kept in ((), ((1, 1),)))
    assert isinstance(plain, WindowedMixer)
    assert isinstance(mixer, WindowedMixer)
    shared = 6 // plain.shape.groups
    assert mixer.shape.kept == tuple(h for h in range(6) if h // shared == 1 // shared)
    assert plain.state is not None
    assert mixer.state is not None
    for (name, whole), part in zip(plain.state.named_parameters(), mixer.state.parameters(), strict=True):
        whole.normal_(std=0.3)
        of_group = name.startswith(("key", "dt", "A"))
        part.copy_(whole[mixer.window_groups if of_group else mixer.window_heads])
    plain.state.gate.fill_(2)
    mixer.state.gate.fill_(2)
    with captured(teacher, spec, [1], attention=False) as calls:
        teacher(tokens(2, 30))
    call = calls[1]
    others = {k: v for k, v in call.kwargs.items() if k not in ("attention_mask", "position_ids")}
    own, near = (m.features(call.input_BLD, **others).unflatten(-1, (6, -1)) for m in (mixer, plain))
    taught = call.heads_BLE.unflatten(-1, (6, -1))
    for head in range(6):
        assert close(own[:, :, head], (taught if head in mixer.shape.kept else near)[:, :, head])
        assert not close(taught[:, :, head], near[:, :, head])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["windowed_mamba2", "window"])
def test_the_cache_grows_by_what_kept_heads_read(kind: str) -> None:
    hybrid = fresh(tiny_teacher(), ONE, kind)
    shape = hybrid.mixers()[1].shape
    for cache in (filled_cache(hybrid, 40), hybrid(tokens(1, 40)).past_key_values):
        floats = [t for t in cache.layers[1].tensors() if t.is_floating_point()]
        planned = cache_bytes(shape, 4) + 40 * kept_bytes_per_token(shape, 4)
        assert sum(t.numel() * t.element_size() for t in floats) == planned
    assert kept_bytes_per_token(shape, 4) == 2 * shape.head_dim * 4


def test_a_window_of_equal_bytes_counts_kept_heads_as_far_as_they_see() -> None:
    mixers = fresh(tiny_teacher(), ONE).mixers()
    spec = family_of(tiny_teacher().config)
    # of two key/value heads one has 9 tokens and 16 prototypes of 9 floats, 18 tokens in all; the other all tokens
    assert [equal_window(tiny_teacher(), spec, mixers, n) for n in (40, 80)] == [(18 + 40) // 2, (18 + 80) // 2]
    # these attentions see 7 tokens by themselves
    teacher = family_teacher("mistral")
    mixers = fresh(teacher, ONE).mixers()
    found = [equal_window(teacher, family_of(teacher.config), mixers, n) for n in (5, 40, 80)]
    assert found[0] < found[1] == found[2]


def test_calibration_fits_the_other_heads() -> None:
    teacher = tiny_teacher()
    student, window = fresh(teacher, ONE), fresh(teacher, ONE, "window")
    windows = [tokens(2, 64, seed) for seed in range(8)]
    fits, alone = (
        calibrate(teacher, s, family_of(teacher.config), windows, CalibrationOptions()) for s in (student, window)
    )
    assert all(fit.accepted and fit.error < other.error for fit, other in zip(fits, alone, strict=True))
    text = tokens(2, 64, seed=99)
    with torch.no_grad():
        own = student(text).logits
        with silenced(student):
            assert (own - student(text).logits).abs().max() > 1e-2
