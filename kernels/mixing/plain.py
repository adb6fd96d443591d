"""The mixing losses of which every product is float32 or wider: what `mixing_loss` is asked, in that dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from .chunked import mixing_chunked
from .reference import mixing_reference
from .teacher import Teacher


def chunked(
    C_BLHN: Tensor, B_BLHN: Tensor, log_a_BLH: Tensor, w_BLH: Tensor, D_H: Tensor, teacher: Teacher,
    valid_BL: Tensor | None, loss: str,
) -> Tensor:  # fmt: skip
    """The loss per head [H] by chunked.py."""
    return _widened(mixing_chunked, C_BLHN, B_BLHN, log_a_BLH, w_BLH, D_H, teacher, valid_BL, loss)


def reference(
    C_BLHN: Tensor, B_BLHN: Tensor, log_a_BLH: Tensor, w_BLH: Tensor, D_H: Tensor, teacher: Teacher,
    valid_BL: Tensor | None, loss: str,
) -> Tensor:  # fmt: skip
    """The loss per head [H] by reference.py."""
    return _widened(mixing_reference, C_BLHN, B_BLHN, log_a_BLH, w_BLH, D_H, teacher, valid_BL, loss)


def _widened(
    function: Callable[..., Tensor], C: Tensor, B: Tensor, log_a: Tensor, w: Tensor, D: Tensor, teacher: Teacher,
    valid: Tensor | None, loss: str,
) -> Tensor:  # fmt: skip
    teacher = replace(teacher, q_BLHK=teacher.q_BLHK.to(log_a.dtype), k_BLHK=teacher.k_BLHK.to(log_a.dtype))
    return function(C.to(log_a.dtype), B.to(log_a.dtype), log_a, w, D, teacher, valid, loss)
