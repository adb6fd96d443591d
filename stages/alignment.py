"""Layer by layer on the teacher's inputs: how far each mixer is from its attention after each stage, and its state.

B batch, L length, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssmorph.convert.capture import MixerCall, captured
from ssmorph.convert.families import FamilySpec
from ssmorph.convert.mixers import Mixer

from .silence import has_state, stateless

Loader = Callable[[], Any]


@torch.no_grad()
def teacher_calls(teacher: Any, spec: FamilySpec, layers: list[int], tokens_BL: Tensor) -> dict[int, MixerCall]:
    """What enters and leaves the attentions of `layers`, with their queries and keys."""
    with captured(teacher, spec, layers, attention=True) as calls:
        teacher.base_model(tokens_BL.to(teacher.device), use_cache=False)
    return calls


@torch.no_grad()
def alignment(
    teacher: Any,
    hybrid: Any,
    spec: FamilySpec,
    calls: dict[int, MixerCall],
    tokens_BL: Tensor,
    earlier: Sequence[tuple[str, Loader]],
) -> dict[str, Any]:
    """Errors of every stage's student, the hybrid last.

    Args:
        calls: `teacher_calls` of the converted layers on `tokens_BL`.
        earlier: the name of each stage before the last, and what loads the student it left.

    Returns:
        `stages`: per stage `mixer`, the relative squared error of each converted layer's output on the teacher's
        inputs, as calibration states it (attention removed: 1); and `stream`, |student - teacher| / |teacher| behind
        every layer on the student's own inputs. `state_share`: how much of each mixer's output goes with its state,
        None for a mixer without one.
    """
    layers = sorted(calls)
    taught = _stream(teacher, spec, tokens_BL)
    rows = []
    for name, load in [*earlier, ("final", lambda: hybrid)]:
        student = load()
        mixers = student.mixers()
        own = _stream(student, spec, tokens_BL)
        stream = [_relative(a, b) for a, b in zip(own, taught, strict=True)]
        rows.append({"stage": name, "mixer": [_error(mixers[i], calls[i]) for i in layers], "stream": stream})
    mixers = hybrid.mixers()
    shares = [state_share(mixers[i], calls[i]) if has_state(mixers[i]) else None for i in layers]
    return {"tokens": tokens_BL.numel(), "layers": layers, "stages": rows, "state_share": shares}


@torch.no_grad()
def state_share(mixer: Mixer, call: MixerCall) -> float:
    """|output - output without a recurrent state| / |output|; 0 for a mixer that says nothing."""
    whole = _answer(mixer, call)
    with stateless(mixer):
        without = _answer(mixer, call)
    return _relative(without, whole)


def _error(mixer: Mixer, call: MixerCall) -> float:
    return _relative(_answer(mixer, call), call.output_BLD) ** 2


def _answer(mixer: Mixer, call: MixerCall) -> Tensor:
    answer: Tensor = mixer(call.input_BLD, **call.kwargs)[0]
    return answer


def _relative(own: Tensor, reference: Tensor) -> float:
    size = float(reference.double().norm())
    return float((own.double() - reference.double()).norm()) / size if size else 0.0


def _stream(model: Any, spec: FamilySpec, tokens_BL: Tensor) -> list[Tensor]:
    """What leaves every decoder layer."""
    blocks = spec.decoder_layers(model)
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _args: tuple, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        model.base_model(tokens_BL.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen
