"""The scan and its step, in our backends and in those of others, for benchmarks.kernels."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssmorph.kernels import ssd
from ssmorph.kernels.common.dispatch import Backends

from .measure import Call, Case
from .minimal_ssd import minimal_ssd

CHUNKS = (32, 64, 128, 256)
# a token's products in each head, P = N = 64, counted without what a causal mask leaves out
Q = 64
DENSE = 2 * Q * (64 + 64) + 4 * 64 * 64
COUNT = (
    f"scan: 2 Q (N + P) + 4 N P FLOP per token and head, counted dense with Q = {Q}, and 3 times that with gradients"
)
# what is not ours, or timed under another name
OTHERS = ("reference", "mamba_ssm", "liger")


def ours(table: Backends, device: str, make: Callable[[str], Call]) -> dict[str, Call]:
    """A call of each of our backends that is made for the device, the default one first."""
    where = torch.device(device)
    default = table.choose(None, where)
    skipped = OTHERS if device == "cuda" else (*OTHERS, "triton")
    rest = (n for n in table.names if n not in (*skipped, default) and table.refusal(n, where) is None)
    return {f"ours ({name})": make(name) for name in (default, *rest)}


def peer(module: str, name: str) -> Callable[..., Any] | str:
    """A peer's function, or why it cannot be had."""
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except Exception as error:  # a package built for another torch fails in any way it likes
        return f"{type(error).__name__}: {error}".splitlines()[0][:100]
    return found


def random(*shape: int, device: str, dtype: torch.dtype, grads: bool = False) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, device=device, dtype=dtype).requires_grad_(grads)


def ssd_case(device: str, dtype: torch.dtype, batch: int, length: int, heads: int, grads: bool) -> Case:
    """The scan, P = N = 64 and a group for each head, in the stock form (w = dt, log a = -dt A)."""
    torch.manual_seed(0)
    x, B, C = (random(batch, length, heads, 64, device=device, dtype=dtype, grads=grads) for _ in range(3))
    dt = (0.1 * torch.rand(batch, length, heads, device=device)).requires_grad_(grads)
    A = -torch.linspace(1, 8, heads, device=device)
    dy = torch.randn_like(x)

    def run(scan: Callable[[], Tensor]) -> Call:
        def call() -> object:
            if not grads:
                with torch.no_grad():
                    return scan()
            return torch.autograd.grad(scan(), (x, B, C, dt), dy)

        return call

    calls = ours(ssd.BACKENDS, device, lambda name: run(lambda: ssd.ssd(x, dt * A, B, C, w_BLH=dt, backend=name)[0]))
    for chunk in CHUNKS:
        minimal = functools.partial(lambda q: minimal_ssd(x * dt[..., None].to(dtype), dt * A, B, C, q), chunk)
        calls[f"the paper's listing, chunks of {chunk}"] = run(minimal)
    theirs, absent = scan_peers(x, dt, A, B, C, device)
    calls |= {name: run(use) for name, use in theirs.items()}
    flops = (3 if grads else 1) * batch * length * heads * DENSE
    return Case(f"ssd L={length} {'forward + backward' if grads else 'forward'}", calls, absent, flops)


def scan_peers(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, device: str
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """Other packages' scans, and why some cannot be had."""
    theirs: dict[str, tuple[str, str, Callable[..., Any]]] = {
        f"transformers, chunks of {chunk}": (
            "transformers.models.mamba2.modeling_mamba2",
            "mamba2_chunk_scan",
            lambda scan, chunk=chunk: first(scan(x, dt, A, B, C, chunk)).to(x.dtype),
        )
        for chunk in CHUNKS
    }
    absent = {} if device == "cuda" else dict.fromkeys(("mamba-ssm", "fla"), "needs a GPU")
    if device == "cuda":
        theirs["mamba-ssm"] = (
            "mamba_ssm.ops.triton.ssd_combined",
            "mamba_chunk_scan_combined",
            lambda scan: scan(x, dt, A, B, C, 256),
        )
        theirs["fla"] = (
            "fla.ops.simple_gla",
            "chunk_simple_gla",
            lambda scan: scan(C, B, x * dt[..., None].to(x.dtype), dt * A, scale=1.0)[0],
        )
    calls: dict[str, Callable[[], Tensor]] = {}
    for name, (module, function, use) in theirs.items():
        scan = peer(module, function)
        if isinstance(scan, str):
            absent[name] = scan
        else:
            calls[name] = functools.partial(use, scan)
    return calls, absent


def first(result: Any) -> Tensor:
    """The output alone."""
    found: Tensor = result[0] if isinstance(result, tuple) else result
    return found


def step_case(device: str, dtype: torch.dtype, batch: int, heads: int) -> Case:
    """One decoded token."""
    x, B, C = (random(batch, heads, 64, device=device, dtype=dtype) for _ in range(3))
    dt = 0.1 * torch.rand(batch, heads, device=device)
    A = -torch.linspace(1, 8, heads, device=device)
    state, other_state = (torch.zeros(batch, heads, 64, 64, device=device) for _ in range(2))
    calls = ours(ssd.STEPS, device, lambda name: lambda: ssd.ssd_step(state, x, dt * A, B, C, w_BH=dt, backend=name))
    other = peer("transformers.models.mamba2.modeling_mamba2", "mamba2_selective_state_update")
    if isinstance(other, str):
        return Case("step", calls, {"transformers": other})
    wide_dt, wide_A = dt[..., None].expand(-1, -1, 64), A[:, None, None].expand(-1, 64, 64)
    calls["transformers"] = torch.no_grad()(lambda: other(other_state, x, wide_dt, wide_A, B, C))
    return Case("step", calls, {})
