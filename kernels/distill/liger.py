"""The package liger-kernel as a backend of `distill_loss`: its fused linear JSD is the same divergence, without tau^2.

It is asked for by name only. It knows no cross-entropy, biases, scales or soft caps: those are refused, and nothing
else runs in its place.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from typing import Any

import torch
from torch import Tensor

from ssmorph.errors import fail

from ..common.gpu import refuses_triton
from .objective import IGNORED, Objective, Side


def refuses_liger(device: torch.device) -> str | None:
    """Why the package cannot run on the device, or None where it can; imports it where it is installed."""
    return refuses_triton(device) or _broken()


@functools.cache
def _broken() -> str | None:
    if importlib.util.find_spec("liger_kernel") is None:
        return "the package liger-kernel is not installed"
    try:
        parameters = inspect.signature(_function().forward).parameters
    except Exception as error:  # a package built for another torch or triton may raise anything
        return f"liger_kernel is installed but does not import: {type(error).__name__}: {error}"
    return None if "accum_dtype" in parameters else "liger_kernel is too old: it sums the head's gradient in its dtype"


def _function() -> Any:
    return importlib.import_module("liger_kernel.ops.fused_linear_jsd").LigerFusedLinearJSDFunction


def distill_liger(student: Side, teacher: Side, labels_T: Tensor | None, objective: Objective) -> Tensor:
    """The scalar loss. Unlike here, the teacher's log-probabilities have no floor in 'reverse_kl'."""
    _check(student, teacher, labels_T, objective)
    hidden_TD, head_VD = student.hidden_TD.to(student.dtype), student.head_VD.to(student.dtype)
    if not hidden_TD.shape[0]:
        return (0 * (hidden_TD.sum() + head_VD.sum())).float()
    teacher_TE, teacher_VE = (t.detach().to(teacher.dtype) for t in (teacher.hidden_TD, teacher.head_VD))
    # its mixture is ours; at the ends it is KL(p||q) and KL(q||p)
    beta = {"kl": 0.0, "reverse_kl": 1.0}.get(objective.loss, objective.beta)
    tau = objective.temperature
    loss: Tensor = _function().apply(
        hidden_TD, head_VD, teacher_TE, teacher_VE, None, beta, IGNORED, tau, torch.float32
    )
    return tau**2 * loss


def _check(student: Side, teacher: Side, labels_T: Tensor | None, objective: Objective) -> None:
    refused = {
        "labels_T with a ce_weight": labels_T is not None,
        "chunk": objective.chunk is not None,
        "a bias": student.bias_V is not None or teacher.bias_V is not None,
        "a scale": student.scale != 1 or teacher.scale != 1,
        "a soft cap": student.softcap is not None or teacher.softcap is not None,
        "float64": torch.float64 in (student.dtype, teacher.dtype),
    }
    for what, given in refused.items():
        if given:
            raise fail("distill_loss.backend", "'liger' takes plain heads alone", what, "Use backend 'triton'.")
