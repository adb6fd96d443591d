"""What a hybrid is made of: who does the work, what each further converted layer costs, matrices and alignment."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ssmorph.convert.families import FamilySpec

from .alignment import Loader, alignment, teacher_calls
from .controls import SINKS, windowed
from .matrices import matrices
from .scores import Candidate, score
from .silence import restored, silenced

# tokens, sinks included, that kept attention still sees when it is narrowed
NARROW = 64


def ablations(teacher: Any, hybrid: Any, spec: FamilySpec, windows_WL: Tensor, points: int) -> dict[str, Any]:
    """Scores of hybrids with a part taken away.

    Args:
        points: how many numbers of converted layers, between none and all, are scored.

    Returns:
        `work`: the hybrid whole, with every state silenced, and with its kept attention narrowed to a short window.
        `added`: with its first k converted layers alone, and the teacher's attention in the others.
    """
    layers = sorted(hybrid.mixers())
    kept = [i for i in range(len(spec.decoder_layers(hybrid))) if i not in layers]
    work = [Candidate("hybrid", hybrid), Candidate("silenced", hybrid, partial(silenced, hybrid))]
    if kept:
        work.append(Candidate("narrowed", hybrid, partial(windowed, hybrid, spec, kept, NARROW)))
    counts = sorted({round(len(layers) * i / (points + 1)) for i in range(1, points + 1)} - {0, len(layers)})
    added = [Candidate(str(k), hybrid, partial(restored, hybrid, teacher, spec, layers[k:])) for k in counts]
    rows = {name: s.summary() for name, s in score(teacher, [*work, *added], windows_WL).items()}
    return {
        "work": {
            "window": windows_WL.shape[1],
            "narrow": {"tokens": NARROW, "sinks": SINKS, "layers": kept},
            "models": {name: rows[name] for name in ["teacher", *(c.name for c in work)]},
        },
        "added": [
            *({"converted": k, **rows[str(k)]} for k in counts),
            {"converted": len(layers), **rows["hybrid"]},
        ],
    }


def internals(
    teacher: Any, hybrid: Any, spec: FamilySpec, tokens_BL: Tensor, earlier: Sequence[tuple[str, Loader]]
) -> dict[str, Any]:
    """`alignment` of every stage's student, and `matrices` of the final one, from one pass of the teacher."""
    calls = teacher_calls(teacher, spec, sorted(hybrid.mixers()), tokens_BL)
    return {
        "alignment": alignment(teacher, hybrid, spec, calls, tokens_BL, earlier),
        "matrices": matrices(hybrid.mixers(), calls),
    }
