"""One new token beside an attention window with sinks, and a Mamba-2 state for what has left it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.dispatch import Backends
from ..common.native import refuses_native
from .plain import Far, Held

__all__ = ["BACKENDS", "Far", "Held", "window_step"]

BACKENDS = Backends(
    "window_step",
    {
        "native": "ssmorph.kernels.window_step.native:step_native",
        "chunked": "ssmorph.kernels.window_step.plain:window_step_chunked",
    },
    refuses={"native": refuses_native},
    on_gpu="chunked",
)


def window_step(
    held: Held,
    q_BHP: Tensor,
    k_BGP: Tensor,
    v_BGP: Tensor,
    *,
    valid_B: Tensor | None = None,
    scale: float,
    softcap: float | None = None,
    far: Far | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Held, Tensor | None]:
    """The token enters the window, the oldest leaves it for a sink or the state, and the token sees all of them.

    Args:
        held: what the window and the sinks hold before the token; not changed.
        q_BHP, k_BGP, v_BGP: the token's; query head h reads key/value head h // (H / G).
        valid_B: False where the token is padding, which is never seen; all are real where left out.
        scale, softcap: logits are c tanh(scale q.k / c).
        far: the state before the token and its parameters; None for a window alone.
        backend: a name of `BACKENDS`; left out, native for float32 on a CPU without gradients, else chunked.

    Returns:
        Values over one normaliser for window and state, [B, H, P], float32; what is held, and the state, afterwards.

    Raises:
        ValueError: an unknown backend or one that cannot run here.
    """
    unfit = None
    if held.k_BGRP.dtype != torch.float32:
        unfit = f"native code holds float32, not {held.k_BGRP.dtype}"
    elif torch.is_grad_enabled() and any(
        isinstance(t, Tensor) and t.requires_grad for t in (q_BHP, k_BGP, v_BGP, *held, *(far or ()))
    ):
        unfit = "native code has no gradients of a single step"
    step = BACKENDS.load(backend, q_BHP.device, {"native": unfit})
    answer, after, state_BGQN = step(held, q_BHP, k_BGP, v_BGP, valid_B, scale, softcap, far)
    return answer, after, state_BGQN
