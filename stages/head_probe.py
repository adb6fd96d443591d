"""Which heads fetch what was said before: a key-value probe, and the gradient of its loss to a gate on every head.

The probe states PAIRS of key and value, both drawn from the tokenizer's ordinary tokens, then names the keys again in
another order. A value after its key cannot be guessed, only fetched, so the loss on values falls with the heads that
fetch [retrieval-aware distillation, 2602.11374]. Where layers keep a window, other words as many as it holds stand in
between, and only what a head brings from behind it counts: most fetching is done by few heads, and the window keeps
the part of it that is near. Synthetic, offline, seeded.

B probes, L length, H heads, P head width, T values asked for, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmorph.convert.families import FamilySpec, logits_of
from ssmorph.convert.keys import Keys, attended_keys
from ssmorph.convert.mixers.attending import Attend, AttentionCall
from ssmorph.convert.mixers.windowed import WindowMixer
from ssmorph.convert.surgery import MixerChoice, shape_of
from ssmorph.convert.window import Scores

from ..errors import fail
from .chat import start_tokens
from .silence import replaced

PAIRS = 16
# backward passes on the way from windows to the teacher
STEPS = 4
# tokens of probes in one of them
AT_ONCE = 2048
# stands between a pair and the next, to keep them apart
SEPARATOR = "\n"


def head_importance(
    teacher: Any, spec: FamilySpec, tokenizer: Any, *, seed: int, probes: int = 8, pairs: int = PAIRS
) -> Tensor:
    """How much every head matters to fetching a value by its key: [layers, heads], float32 on the CPU, not negative.

    Every head's output is multiplied by a gate of 1 before the output projection; its importance is |d loss / d gate|,
    to first order the change of the loss where the head is taken away, as a mean over probes. One backward pass.

    Args:
        probes: sequences of about 6 * `pairs` tokens.

    Raises:
        ValueError: a tokenizer with too few ordinary tokens for the pairs.
    """
    probe = key_value_probes(tokenizer, seed, probes, pairs)
    slopes = _slopes(teacher, spec, probe, 1.0, lambda gates: gated_heads(teacher, spec, gates))
    return torch.stack([slope_BH.abs().mean(0) for slope_BH in slopes]).float().cpu()


def far_importance(
    teacher: Any, spec: FamilySpec, tokenizer: Any, window: int, sinks: int, *, seed: int, probes: int = 8
) -> Tensor:
    """How much what every head brings from behind a window matters to fetching: [layers, heads], float32 on the CPU.

    That part is multiplied by a gate, the same for all heads, which opens from 0 (all layers have a window) to 1 (the
    teacher). A head's importance is its share of what the loss falls by on the way [integrated gradients, Sundararajan
    et al., 2017], negative where it does harm. Slopes at 0 or 1 alone would miss it: at 0 no head can do anything
    without the others, at 1 few are missed. STEPS backward passes.

    Args:
        window: tokens, `sinks` among them.

    Raises:
        ValueError: as `head_importance`.
    """
    probe = key_value_probes(tokenizer, seed, probes, gap=window)
    total = torch.zeros(len(spec.decoder_layers(teacher)), spec.shape(teacher.config).heads)
    for step in range(STEPS):
        opening = (step + 0.5) / STEPS
        slopes = _slopes(teacher, spec, probe, opening, lambda gates: far_heads(teacher, spec, window, sinks, gates))
        total -= torch.stack([slope_BH.mean(0) for slope_BH in slopes]).float().cpu() / STEPS
    return total


def _slopes(
    teacher: Any,
    spec: FamilySpec,
    probe: tuple[Tensor, Tensor],
    opening: float,
    gated: Callable[[list[Tensor]], contextlib.AbstractContextManager[None]],
) -> list[Tensor]:
    """The slope of each probe's loss with each gate, all of them at `opening`: [B, H] for every layer."""
    tokens_BL, asked_T = probe
    heads, rows = spec.shape(teacher.config).heads, max(1, AT_ONCE // tokens_BL.shape[1])
    found: list[tuple[Tensor, ...]] = []
    for part_BL in tokens_BL.to(teacher.device).split(rows):
        gates = [
            torch.full((len(part_BL), heads), opening, device=teacher.device, requires_grad=True)
            for _ in spec.decoder_layers(teacher)
        ]
        with torch.enable_grad(), gated(gates):
            loss_B = value_loss(teacher, part_BL, asked_T)
            # a gate belongs to one probe, so the gradient of the sum is each probe's own
            found.append(torch.autograd.grad(loss_B.sum(), gates))
    return [torch.cat(slopes) for slopes in zip(*found, strict=True)]


@contextlib.contextmanager
def gated_heads(model: Any, spec: FamilySpec, gates: list[Tensor]) -> Iterator[None]:
    """While open, the output of head h of layer i is multiplied by `gates[i]`, [B or 1, H], in every row."""

    def gate(_module: nn.Module, args: tuple, gate_BH: Tensor) -> tuple:
        heads_BLHP = args[0].unflatten(-1, (gate_BH.shape[1], -1))
        return ((heads_BLHP * gate_BH[:, None, :, None].to(heads_BLHP.dtype)).flatten(-2), *args[1:])

    with contextlib.ExitStack() as stack:
        for index, gate_BH in enumerate(gates):
            out = spec.attention(model, index).get_submodule(spec.out)
            handle = out.register_forward_pre_hook(lambda module, args, g=gate_BH: gate(module, args, g))
            stack.callback(handle.remove)
        yield


@contextlib.contextmanager
def far_heads(model: Any, spec: FamilySpec, window: int, sinks: int, gates: list[Tensor]) -> Iterator[None]:
    """While open, what head h of layer i attends to behind its window is multiplied by `gates[i]`, [B or 1, H]."""
    shape = shape_of(spec.shape(model.config), MixerChoice(kind=WindowMixer.kind, window=window, sinks=sinks))
    mixers = {}
    for index, gate_BH in enumerate(gates):
        # a shallow copy shares the weights: the mixer changes its config alone
        mixers[index] = _Opening(shape, index, copy.copy(spec.attention(model, index)), spec.out)
        mixers[index].gate_BH = gate_BH
    with replaced(model, spec, mixers):
        yield


class _Opening(WindowMixer):
    """A window, and a gate for what the attention sees behind it."""

    gate_BH: Tensor

    def answer(self, call: AttentionCall) -> Attend:
        narrow = super().answer(call)
        groups = [self.shape.group_of(h) for h in range(self.shape.heads)]

        def attend(q_BHLP: Tensor, k_BGLP: Tensor, v_BGLP: Tensor, scores: Scores) -> Tensor:
            near_BLHP = narrow(q_BHLP, k_BGLP, v_BGLP, scores)
            keys = Keys(k_BGLP, v_BGLP, call.valid_BL)
            full_BLHP = attended_keys(q_BHLP, keys, groups, call.segment_BL, scores).transpose(1, 2)
            return near_BLHP + self.gate_BH[:, None, :, None].to(near_BLHP.dtype) * (full_BLHP - near_BLHP)

        return attend


def value_loss(model: Any, tokens_BL: Tensor, asked_T: Tensor) -> Tensor:
    """Mean cross-entropy [B] of the values at positions `asked_T`, each from all tokens before it."""
    hidden_BLD = model.base_model(tokens_BL, use_cache=False).last_hidden_state
    logits_BTV = logits_of(model, hidden_BLD[:, asked_T - 1])
    return F.cross_entropy(logits_BTV.transpose(1, 2), tokens_BL[:, asked_T], reduction="none").mean(1)


def key_value_probes(tokenizer: Any, seed: int, probes: int, pairs: int = PAIRS, gap: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens [B, L] of the probes, and the positions [T] of the values asked for.

    Args:
        gap: about so many tokens of other words stand between pairs and questions.

    Raises:
        ValueError: as `head_importance`.
    """
    ordinary = ordinary_tokens(tokenizer, 2 * pairs + (gap > 0))
    start, between = start_tokens(tokenizer), tokenizer(SEPARATOR, add_special_tokens=False).input_ids
    generator = torch.Generator().manual_seed(seed)
    step = 2 + len(between)
    fillers = math.ceil(gap / step)
    rows: list[list[int]] = []
    for _ in range(probes):
        shuffled = ordinary[torch.randperm(len(ordinary), generator=generator)]
        keys, values = shuffled[: 2 * pairs].chunk(2)
        order = torch.randperm(pairs, generator=generator)
        stated = [(int(k), int(v)) for k, v in zip(keys, values, strict=True)]
        asked = [stated[i] for i in order.tolist()]
        others: list[list[int]] = []
        if fillers:
            spare = shuffled[2 * pairs :]
            others = spare[torch.randint(len(spare), (fillers, 2), generator=generator)].tolist()
        rows.append(start + [token for pair in [*stated, *others, *asked] for token in (*pair, *between)])
    return torch.tensor(rows), torch.arange(pairs + fillers, 2 * pairs + fillers) * step + 1 + len(start)


def ordinary_tokens(tokenizer: Any, needed: int) -> Tensor:
    """Ids that stand for text: words where the vocabulary has enough of them, else all but special tokens."""
    special = set(tokenizer.all_special_ids)
    vocabulary = {text: i for text, i in tokenizer.get_vocab().items() if i not in special}
    words = [i for text, i in vocabulary.items() if len(text) > 2 and text[1:].isalpha() and text[1:].isascii()]
    chosen = sorted(words if len(words) >= needed else vocabulary.values())
    if len(chosen) < needed:
        raise fail("placement", f"its probe needs {needed} ordinary tokens", len(chosen), "Use another strategy.")
    return torch.tensor(chosen)
