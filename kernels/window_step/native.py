"""One token beside a window and a state in C on a CPU: native.c with its sizes and addresses, in float32."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..common.native import call
from .plain import Far, Held

SOURCE = "window_step/native.c"
HELD = ("ring_k", "ring_v", "ring_valid", "sink_k", "sink_v", "filled", "seen")
PARAMETERS = {
    "state": "state_BGQN", "key_map": "key_map_GNP", "key_bias": "key_bias_GN", "query_map": "query_map_HNP",
    "query_bias": "query_bias_HN", "dt_map": "dt_map_GP", "dt_bias": "dt_bias_G", "A_log": "A_log_G", "gate": "gate_H",
}  # fmt: skip


class _Problem(ctypes.Structure):
    """As in native.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "heads", "groups", "width", "window", "sinks", "states")),
        *((name, ctypes.c_int64) for name in ("turned", "tables")),
        *((name, ctypes.c_double) for name in ("scale", "softcap", "headroom")),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "ring_k", "ring_v", "sink_k", "sink_v")),
        *((name, ctypes.c_void_p) for name in ("valid", "ring_valid", "filled", "seen")),
        *((name, ctypes.c_void_p) for name in (*PARAMETERS, "cos", "sin")),
        *((name, ctypes.c_void_p) for name in ("answer", "new_ring_k", "new_ring_v", "new_sink_k", "new_sink_v")),
        *((name, ctypes.c_void_p) for name in ("new_state", "new_ring_valid", "new_filled", "new_seen")),
    ]


def step_native(
    held: Held, q_BHP: Tensor, k_BGP: Tensor, v_BGP: Tensor, valid_B: Tensor | None, scale: float,
    softcap: float | None, far: Far | None,
) -> tuple[Tensor, Held, Tensor | None]:  # fmt: skip
    """`window_step` in float32, without gradients."""
    groups, window = held.k_BGRP.shape[1:3]
    problem = _Problem(*q_BHP.shape[:2], groups, q_BHP.shape[2], window, held.filled_BS.shape[1])
    problem.scale, problem.softcap = scale, softcap or 0.0
    after = Held(*(torch.empty_like(t, memory_format=torch.contiguous_format) for t in held))
    answer_BHP = torch.empty(q_BHP.shape)
    read = {"q": q_BHP, "k": k_BGP, "v": v_BGP, **dict(zip(HELD, held, strict=True))}
    written = {"answer": answer_BHP, **{f"new_{name}": t for name, t in zip(HELD, after, strict=True)}}
    if valid_B is not None:
        read["valid"] = valid_B
    state_BGQN = None
    if far is not None:
        problem.states, problem.headroom = far.state_BGQN.shape[3], far.headroom
        read |= {name: getattr(far, field) for name, field in PARAMETERS.items()}
        written["new_state"] = state_BGQN = torch.empty(far.state_BGQN.shape)
        if far.tables is not None:
            read["cos"], read["sin"] = (t.float() for t in far.tables)
            problem.tables, problem.turned = far.tables[0].shape[0], far.tables[0].shape[-1]
    # copies, where a tensor is none of a block, stay alive in this list
    blocks = {name: t.detach().contiguous() for name, t in read.items()}
    for name, t in (blocks | written).items():
        setattr(problem, name, t.data_ptr())
    call(SOURCE, "window_step", problem, torch.float32, q_BHP.shape[0])
    return answer_BHP, after, state_BGQN
