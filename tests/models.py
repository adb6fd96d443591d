"""Tiny random models for tests, strong enough that states and caches move the logits: asserted where they are made."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import LlamaForCausalLM

from ssmorph.convert.families import family_of
from ssmorph.convert.mixers import HeadsMixer, ScanMixer, WindowedMixer
from ssmorph.convert.modeling import hybrid_of
from ssmorph.convert.surgery import MixerChoice, start_mixer
from ssmorph.convert.tiny import byte_tokenizer, strengthen, tiny_config

# heads that stay attention, (layer, head): none in layer 0, of both key/value heads in layer 1, all in layer 2
KEPT = ((1, 1), (1, 4), *((2, head) for head in range(6)), (3, 5))
# around windows: the first key/value head of layer 1, all of layer 2, the last of layer 3
WHOLE = ((1, 0), *((2, head) for head in range(6)), (3, 5))
# `windowed_mamba2` with these, as the tests call it
WINDOWED_HEADS = "windowed_heads"


def tiny_teacher(**changes: Any) -> Any:
    """A strong random Llama in eval mode."""
    return strengthen(LlamaForCausalLM(tiny_config(**changes))).eval().requires_grad_(False)


def starting_tokenizer() -> Any:
    """Bytes, and <s> before a text, as Gemma and Llama have it."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def choice_of(kind: str) -> MixerChoice:
    """What a mixer is made of; a window shorter than any text of the tests, so that its state is asked."""
    if kind == WINDOWED_HEADS:
        return MixerChoice(kind=WindowedMixer.kind, window=5, sinks=2, state=7, kept=WHOLE)
    return MixerChoice(kind=kind, window=5, sinks=2, state=7, kept=KEPT if kind == HeadsMixer.kind else ())


def tiny_hybrid(kind: str = "mamba2", layers: tuple[int, ...] = (1, 3), teacher: Any = None) -> Any:
    """A hybrid whose every tap, gate, decay and skip is drawn at random, and whose state demonstrably matters."""
    teacher = teacher or tiny_teacher()
    family = family_of(teacher.config)
    torch.manual_seed(0)
    mixers = {i: start_mixer(teacher, family, i, choice_of(kind)) for i in layers}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for mixer in mixers.values():
            if isinstance(mixer, WindowedMixer):
                if mixer.state is not None:
                    for parameter in mixer.state.parameters():
                        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
                    mixer.state.gate.fill_(2)
                continue
            if isinstance(mixer, HeadsMixer):
                if mixer.scan is None:
                    continue
                mixer = mixer.scan
            assert isinstance(mixer, ScanMixer)
            mixer.conv1d.weight.copy_(0.6 * torch.randn(mixer.conv1d.weight.shape, generator=generator))
            mixer.D.copy_(torch.randn(mixer.D.shape, generator=generator))
            mixer.in_proj.weight[-mixer.shape.heads :].normal_(std=0.1, generator=generator)
    student = hybrid_of(teacher, mixers, "test")
    assert_states_matter(student)
    return student


@torch.no_grad()
def assert_states_matter(student: Any) -> None:
    """Zeroing the recurrent states, and what else is cached, each moves the next logits by 1e-2 at least."""
    tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(2))
    cache = student(tokens[:, :20], use_cache=True).past_key_values
    expected = student(tokens[:, 20:], past_key_values=copy.deepcopy(cache)).logits
    for part in ("recurrent_states", "conv_states", "held", "kept"):
        damaged, zeroed = copy.deepcopy(cache), 0
        for i in student.mixers():
            kept = getattr(damaged.layers[i], part, None) or {}
            for tensor in kept.values() if isinstance(kept, dict) else kept[:2]:
                if tensor is not None:
                    tensor.zero_()
                    zeroed += 1
        moved = (student(tokens[:, 20:], past_key_values=damaged).logits - expected).abs().max()
        assert moved >= 1e-2 or not zeroed, f"zeroing {part} moved logits by {moved}"
