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


def who_works(teacher: Any, hybrid: Any, spec: FamilySpec, windows_WL: Tensor) -> dict[str, Any]:
    """Scores of the hybrid whole, with every state silenced, and with its kept attention narrowed to a short window."""
    kept = [i for i in range(len(spec.decoder_layers(hybrid))) if i not in hybrid.mixers()]
    candidates = [Candidate("hybrid", hybrid), Candidate("silenced", hybrid, partial(silenced, hybrid))]
    if kept:
        candidates.append(Candidate("narrowed", hybrid, partial(windowed, hybrid, spec, kept, NARROW)))
    scored = score(teacher, candidates, windows_WL)
    return {
        "window": windows_WL.shape[1],
        "narrow": {"tokens": NARROW, "sinks": SINKS, "layers": kept},
        "models": {name: s.summary() for name, s in scored.items()},
    }


def layers_added(
    teacher: Any, hybrid: Any, spec: FamilySpec, windows_WL: Tensor, points: int, whole: dict[str, float]
) -> list[dict[str, Any]]:
    """Scores with the first k converted layers converted and the teacher's attention in the others.

    Args:
        points: how many k between none and all.
        whole: the scores with all of them.
    """
    layers = sorted(hybrid.mixers())
    counts = sorted({round(len(layers) * i / (points + 1)) for i in range(1, points + 1)} - {0, len(layers)})
    candidates = [Candidate(str(k), hybrid, partial(restored, hybrid, teacher, spec, layers[k:])) for k in counts]
    scored = score(teacher, candidates, windows_WL) if candidates else {}
    rows = [{"converted": k, **scored[str(k)].summary()} for k in counts]
    return [*rows, {"converted": len(layers), **whole}]


def internals(
    teacher: Any, hybrid: Any, spec: FamilySpec, tokens_BL: Tensor, earlier: Sequence[tuple[str, Loader]]
) -> dict[str, Any]:
    """`alignment` of every stage's student, and `matrices` of the final one, from one pass of the teacher."""
    calls = teacher_calls(teacher, spec, sorted(hybrid.mixers()), tokens_BL)
    return {
        "alignment": alignment(teacher, hybrid, spec, calls, tokens_BL, earlier),
        "matrices": matrices(hybrid.mixers(), calls),
    }
