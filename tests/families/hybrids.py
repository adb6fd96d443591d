"""What the contract's files share: one hybrid of every family and mixer, random tokens, and when logits are equal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.families.tiny import ROWS, family_teacher
from tests.models import WINDOWED_HEADS, tiny_hybrid

KINDS = ("mamba2", "discrete_mamba2")
# a window adds what is an attention's own: soft caps, norms, scales, parallel blocks, one key/value head
WITH_WINDOW = ("llama", "qwen3", "phi", "gemma2", "gemma3", "gpt_neox", "granite")
# kept heads add the same, and sliding windows of the teacher's own
WITH_HEADS = ("llama", "mistral", "phi-normed", "gemma2", "gemma3", "olmo2", "gpt_neox")
WITH_BOTH = ("llama", "mistral", "gemma2", "gemma3", "gpt_neox")
EACH = [(row, kind) for row in ROWS for kind in KINDS]
EACH += [(row, "windowed_mamba2") for row in WITH_WINDOW] + [(row, "mamba2_heads") for row in WITH_HEADS]
EACH += [(row, WINDOWED_HEADS) for row in WITH_BOTH]


def some_layers(row: str, kind: str) -> Any:
    """A hybrid of a row with layers 1 and 3 converted, in eval mode and frozen."""
    return tiny_hybrid(kind, (1, 3), family_teacher(row)).requires_grad_(False)


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random bytes, [batch, length]."""
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(own: Tensor, expected: Tensor) -> bool:
    """Equal up to 1e-5 of the largest expected value."""
    return bool((own - expected).abs().max() <= 1e-5 * expected.abs().max())
