"""What a distillation loss minimises, apart from tensors."""

from __future__ import annotations

from dataclasses import dataclass

DIVERGENCES = ("kl", "reverse_kl", "jsd")
IGNORED = -100  # label of a token without one, as in torch's cross_entropy
FLOOR = -100.0  # least log-probability of the teacher in the reverse KL: e^-100 is 0 in float32


@dataclass(frozen=True)
class Objective:
    """Arguments of `distill_loss` under the same names."""

    loss: str
    temperature: float
    beta: float
    ce_weight: float
    student_softcap: float | None
    teacher_softcap: float | None
    chunk: int
