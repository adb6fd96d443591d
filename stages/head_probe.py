"""Which heads fetch what was said before: a key-value probe, and the gradient of its loss to a gate on every head.

The probe states PAIRS of key and value, both drawn from the tokenizer's ordinary tokens, then names the keys again in
another order. A value after its key cannot be guessed, only fetched, so the loss on values falls with the heads that
fetch [retrieval-aware distillation, 2602.11374]. Synthetic, offline, seeded.

B probes, L length, H heads, P head width, T values asked for, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmorph.convert.families import FamilySpec

from ..errors import fail

PAIRS = 16
# stands between a pair and the next, to keep them apart
SEPARATOR = "\n"


def head_importance(
    teacher: Any, spec: FamilySpec, tokenizer: Any, *, seed: int, probes: int = 8, pairs: int = PAIRS
) -> Tensor:
    """How much every head matters to fetching a value by its key: [layers, heads], float32 on the CPU, not negative.

    Every head's output is multiplied by a gate of 1 before the output projection; its importance is |d loss / d gate|,
    to first order the change of the loss where the head is taken away, as a mean over probes. One backward pass.

    Args:
        probes: sequences of about 6 * `pairs` tokens, all in one batch.

    Raises:
        ValueError: a tokenizer with too few ordinary tokens for the pairs.
    """
    tokens_BL, asked_T = key_value_probes(tokenizer, seed, probes, pairs)
    tokens_BL = tokens_BL.to(teacher.device)
    gates = [
        torch.ones(probes, spec.shape(teacher.config).heads, device=teacher.device, requires_grad=True)
        for _ in spec.decoder_layers(teacher)
    ]
    with torch.enable_grad(), gated_heads(teacher, spec, gates):
        loss_B = value_loss(teacher, tokens_BL, asked_T)
        # a gate belongs to one probe, so the gradient of the sum is each probe's own
        slopes = torch.autograd.grad(loss_B.sum(), gates)
    return torch.stack([slope_BH.abs().mean(0) for slope_BH in slopes]).float().cpu()


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


def value_loss(model: Any, tokens_BL: Tensor, asked_T: Tensor) -> Tensor:
    """Mean cross-entropy [B] of the values at positions `asked_T`, each from all tokens before it."""
    hidden_BLD = model.base_model(tokens_BL, use_cache=False).last_hidden_state
    logits_BTV = model.get_output_embeddings()(hidden_BLD[:, asked_T - 1]).float()
    return F.cross_entropy(logits_BTV.transpose(1, 2), tokens_BL[:, asked_T], reduction="none").mean(1)


def key_value_probes(tokenizer: Any, seed: int, probes: int, pairs: int = PAIRS) -> tuple[Tensor, Tensor]:
    """Tokens [B, L] of the probes, and the positions [T] of the values asked for.

    Raises:
        ValueError: as `head_importance`.
    """
    ordinary = ordinary_tokens(tokenizer, 2 * pairs)
    between = tokenizer(SEPARATOR, add_special_tokens=False).input_ids
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(probes):
        drawn = ordinary[torch.randperm(len(ordinary), generator=generator)[: 2 * pairs]]
        keys, values = drawn.chunk(2)
        order = torch.randperm(pairs, generator=generator)
        stated = [(int(k), int(v)) for k, v in zip(keys, values, strict=True)]
        asked = [stated[i] for i in order.tolist()]
        rows.append([token for pair in [*stated, *asked] for token in (*pair, *between)])
    step = 2 + len(between)
    return torch.tensor(rows), torch.arange(pairs, 2 * pairs) * step + 1


def ordinary_tokens(tokenizer: Any, needed: int) -> Tensor:
    """Ids that stand for text: words where the vocabulary has enough of them, else all but special tokens."""
    special = set(tokenizer.all_special_ids)
    vocabulary = {text: i for text, i in tokenizer.get_vocab().items() if i not in special}
    words = [i for text, i in vocabulary.items() if len(text) > 2 and text[1:].isalpha() and text[1:].isascii()]
    chosen = sorted(words if len(words) >= needed else vocabulary.values())
    if len(chosen) < needed:
        raise fail("placement", f"its probe needs {needed} ordinary tokens", len(chosen), "Use another strategy.")
    return torch.tensor(chosen)
