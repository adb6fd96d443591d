"""The frozen side of the mixing losses: what is needed to write down the teacher's attention matrix.

B batch, L length, H heads, K key width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Teacher:
    """Causal attention softmax(cap(scale q k^T) + mask), detached and with keys already repeated per head.

    Attributes:
        q_BLHK, k_BLHK: queries and keys after the position encoding.
        scale: factor of the scores.
        window: a query sees the keys at distances below this; None sees all.
        softcap: c in c tanh(score / c); None leaves the scores alone.
        sinks_H: one more logit per head that takes probability and has no column; None for none.
    """

    q_BLHK: Tensor
    k_BLHK: Tensor
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks_H: Tensor | None = None
