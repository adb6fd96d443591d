"""The frozen side of a relation loss: what there is besides the student's vectors.

B batch, L length, H relation heads, K width of a teacher's relation head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """The teacher's vectors, detached, and how both sides are compared.

    Attributes:
        teacher_BLHK: finite everywhere, 0 at padded tokens.
        student_scale, teacher_scale: factors of the scores.
        causal: rows see themselves and what is before them; else everything.
        valid_BL: False at padded tokens; None where there are none.
    """

    teacher_BLHK: Tensor
    student_scale: float
    teacher_scale: float
    causal: bool
    valid_BL: Tensor | None

    @property
    def tokens(self) -> int | Tensor:
        """Rows that a head's loss is a mean over, at least 1; a tensor, unread, where a mask says how many."""
        batch, length = self.teacher_BLHK.shape[:2]
        return max(batch * length, 1) if self.valid_BL is None else self.valid_BL.sum().clamp(min=1)


def computed_in(student: Tensor) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(student.dtype, torch.float32)
