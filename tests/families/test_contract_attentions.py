"""`output_attentions` of a hybrid: the weights of the layers that kept attention.

transformers' own classes decide what a layer without weights is: Falcon's loop puts None, all others leave it out.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.families.hybrids import EACH, tokens
from tests.families.tiny import family_teacher
from tests.models import tiny_hybrid


@torch.no_grad()
@pytest.mark.parametrize(("row", "kind"), EACH)
def test_kept_layers_give_their_weights(row: str, kind: str) -> None:
    teacher = family_teacher(row, attn_implementation="eager")
    hybrid: Any = tiny_hybrid(kind, (1, 3), teacher)
    x = tokens(2, 9)
    found = hybrid(x, output_attentions=True).attentions
    if row.startswith("falcon"):
        assert found[1] is None
        assert found[3] is None
        found = found[::2]
    assert len(found) == 2
    assert all(torch.allclose(weights.sum(-1), torch.ones(2, 6, 9), atol=1e-5) for weights in found)
    # nothing before layer 0 was converted
    assert torch.equal(found[0], teacher(x, output_attentions=True).attentions[0])
