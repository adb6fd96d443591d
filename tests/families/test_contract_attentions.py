"""`output_attentions` of a hybrid: one entry for each layer, the weights where attention was kept, None elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.families.hybrids import EACH, tokens
from tests.families.tiny import family_teacher
from tests.models import tiny_hybrid


@torch.no_grad()
@pytest.mark.parametrize(("row", "kind"), EACH)
def test_kept_layers_give_weights_and_converted_ones_none(row: str, kind: str) -> None:
    hybrid: Any = tiny_hybrid(kind, (1, 3), family_teacher(row, attn_implementation="eager"))
    found = hybrid(tokens(2, 9), output_attentions=True).attentions
    print(row, [None if a is None else tuple(a.shape) for a in found])
    assert [a is None for a in found] == [False, True, False, True]
    for weights in found[::2]:
        assert weights.shape == (2, 6, 9, 9)
        assert torch.allclose(weights.sum(-1), torch.ones(2, 6, 9), atol=1e-5)
