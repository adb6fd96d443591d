"""Relation losses: how differently two models relate the tokens of a sequence, whatever their widths [MiniLM]."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmorph.errors import fail

from ..common.dispatch import Backends
from ..common.gpu import refuses_triton
from ..common.rows import too_wide
from .problem import Problem
from .triton_plan import LAUNCHES

BACKENDS = Backends(
    "relation_loss",
    {
        "chunked": "ssmorph.kernels.relation.chunked:relation_chunked",
        "triton": "ssmorph.kernels.relation.triton:relation_triton",
        "reference": "ssmorph.kernels.relation.reference:relation_reference",
    },
    refuses={"triton": refuses_triton},
    on_gpu="triton",
)

__all__ = ["BACKENDS", "relation_loss"]


def relation_loss(
    student_BLW: Tensor,
    teacher_BLV: Tensor,
    *,
    heads: int,
    causal: bool = True,
    student_scale: float | None = None,
    teacher_scale: float | None = None,
    valid_BL: Tensor | None = None,
    per_head: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Mean over tokens and relation heads of KL(teacher || student) between rows of softmax(scale X X^T).

    X are queries, keys or values, or what stands for them, of all heads side by side; the loss of MiniLMv2 is the sum
    over the three [MiniLM, 2002.10957, eq. 6; MiniLMv2, 2012.15828, eq. 5]. Both sides are split anew into `heads`
    heads, so that heads and widths of the models may differ. Gradients go to the student's side alone. Computed in
    float32 (float64 for float64) and O(L) memory but for 'reference'; 'triton' multiplies half-precision inputs as they
    are, and rounds gradients of scores before that. Whatever stands at padded tokens has no influence and gets
    gradient 0.

    Args:
        student_BLW, teacher_BLV: vectors of one kind, the heads concatenated; the widths W and V may differ.
        heads: relation heads; must divide both widths.
        causal: a token is related to itself and those before it; else to all.
        student_scale, teacher_scale: factors of the scores; left out, 1 / sqrt(width of a relation head).
        valid_BL: False at padded tokens: they count neither as rows nor as columns.
        per_head: return one value per relation head [heads]; their mean is the loss.
        backend: a name of `BACKENDS`; left out, SSMORPH_BACKEND or the best for the device.

    Returns:
        A scalar, or [heads] where per_head, in float32 (float64 for float64). 0 where no token is valid.

    Raises:
        ValueError: shapes that disagree, heads that do not divide a width, integers instead of floating-point numbers,
            an unknown backend, or one that cannot run here.
    """
    _check_shapes(student_BLW, teacher_BLV, heads)
    _check_valid(student_BLW, valid_BL)
    student, teacher = student_BLW, teacher_BLV.detach()
    if valid_BL is not None:
        student, teacher = (t.masked_fill(~valid_BL[..., None], 0) for t in (student, teacher))
    student, teacher = (t.unflatten(-1, (heads, -1)) for t in (student, teacher))
    function = BACKENDS.load(backend, student.device, {"triton": too_wide(LAUNCHES, student, teacher)})
    scales = (_scale(student_scale, student), _scale(teacher_scale, teacher))
    with torch.autocast(student.device.type, enabled=False):
        loss_H: Tensor = function(student, Problem(teacher, *scales, causal, valid_BL))
    return loss_H if per_head else loss_H.mean()


def _scale(given: float | None, t_BLHK: Tensor) -> float:
    return float(t_BLHK.shape[-1]) ** -0.5 if given is None else float(given)


def _check_shapes(student: Tensor, teacher: Tensor, heads: int) -> None:
    if student.ndim != 3:
        rule = "has batch, length and width"
        raise fail("relation_loss.student_BLW", rule, tuple(student.shape), "Concatenate the heads.")
    if teacher.ndim != 3 or teacher.shape[:2] != student.shape[:2]:
        rule = f"must be [{student.shape[0]}, {student.shape[1]}, width] as student_BLW is"
        raise fail("relation_loss.teacher_BLV", rule, tuple(teacher.shape), "Run both on one batch.")
    for name, t in (("student_BLW", student), ("teacher_BLV", teacher)):
        if not t.is_floating_point():
            raise fail(f"relation_loss.{name}", "must be floating-point", t.dtype, "Give vectors, not tokens.")
        if heads < 1 or t.shape[2] == 0 or t.shape[2] % heads:
            rule = f"must be positive and divide the width {t.shape[2]} of {name}"
            raise fail("relation_loss.heads", rule, heads, "Choose a divisor of both widths.")


def _check_valid(student: Tensor, valid: Tensor | None) -> None:
    if valid is None:
        return
    shape = tuple(student.shape[:2])
    if tuple(valid.shape) != shape:
        rule = f"must have shape {shape}"
        raise fail("relation_loss.valid_BL", rule, tuple(valid.shape), "Check it against student_BLW.")
    if valid.dtype != torch.bool:
        rule = "must be boolean, True at tokens"
        raise fail("relation_loss.valid_BL", rule, valid.dtype, "Compare the mask with 0.")
