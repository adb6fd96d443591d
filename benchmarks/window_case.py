"""One token beside a window and a state, and the attention over all tokens that it replaces, for benchmarks.kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmorph.kernels import window_step
from ssmorph.kernels.window_step import Far, Held

from .measure import Call, Case
from .scan_cases import ours, random

WIDTH, WINDOW, SINKS, STATES = 64, 60, 4, 64
CONTEXTS = (512, 4096)


def window_case(device: str, dtype: torch.dtype, batch: int, heads: int, groups: int) -> Case:
    """The demo's window and state after they are full; the peers are torch's attention over a cache of so many tokens,
    which grows by the new one."""
    torch.manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return random(*shape, device=device, dtype=dtype)

    q, k, v = normal(batch, heads, WIDTH), normal(batch, groups, WIDTH), normal(batch, groups, WIDTH)
    ring, sinks = (torch.ones(batch, n, dtype=torch.bool, device=device) for n in (WINDOW, SINKS))
    held = Held(
        normal(batch, groups, WINDOW, WIDTH), normal(batch, groups, WINDOW, WIDTH), ring,
        normal(batch, groups, SINKS, WIDTH), normal(batch, groups, SINKS, WIDTH), sinks,
        torch.full((batch,), 1000, device=device),
    )  # fmt: skip
    angle = torch.rand(1, 1, WIDTH, device=device)
    far = Far(
        random(batch, groups, WIDTH + 1, STATES, device=device, dtype=torch.float32), normal(groups, STATES, WIDTH),
        normal(groups, STATES), normal(heads, STATES, WIDTH), normal(heads, STATES), normal(groups, WIDTH),
        normal(groups), normal(groups), normal(heads), 30.0, (angle.cos(), angle.sin()),
    )  # fmt: skip

    def step(backend: str) -> Call:
        return lambda: window_step.window_step(held, q, k, v, scale=0.125, far=far, backend=backend)

    def attention(context: int) -> Call:
        cached = normal(2, batch, groups, context, WIDTH)

        def call() -> object:
            keys, values = (torch.cat([old, new.unsqueeze(2)], 2) for old, new in zip(cached, (k, v), strict=True))
            return F.scaled_dot_product_attention(q.unsqueeze(2), keys, values, scale=0.125, enable_gqa=True)

        return call

    calls = ours(window_step.BACKENDS, device, step)
    return Case("window step", calls | {f"torch's attention, {n} tokens": attention(n) for n in CONTEXTS}, {})
