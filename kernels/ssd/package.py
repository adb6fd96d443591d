"""The package mamba-ssm as a backend: its Triton kernels of the same scan and step.

It is asked for by name only. What it cannot do is refused, and nothing else runs in its place.

Its public scan has one dt per token, which decays, exp(A dt), and weighs, dt x B^T. Ours has a log-decay and a weight
that are free of each other; putting them into dt and x would divide by a dt that may be 0. Inside, dt becomes a
cumulative decay and a weight in the first line (`_chunk_cumsum_fwd`), and their gradients meet again in the last one
(`_chunk_cumsum_bwd`); the kernels between know both apart. So its forward and backward functions run as they are, but
with their own decay and weight in the place of those two lines.

B batch, L length, H heads, G groups, P head width, N state width, K chunks, Q chunk length.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssmorph.errors import fail

SCAN = "mamba_ssm.ops.triton.ssd_combined"
STEP = "mamba_ssm.ops.triton.selective_state_update"
FIRST, LAST = "_chunk_cumsum_fwd", "_chunk_cumsum_bwd"
# the default of its models
CHUNK = 256
# blocks in the last dimension of a CUDA grid, where its step has the heads
MOST = 65535


def refuses_scan(device: torch.device) -> str | None:
    """Why the package's scan cannot run on the device, or None where it can; on a GPU imports it."""
    return _broken(_scan) if device.type == "cuda" else "mamba_ssm needs a GPU"


def refuses_step(device: torch.device) -> str | None:
    """As `refuses_scan`, for the step."""
    return _broken(_step) if device.type == "cuda" else "mamba_ssm needs a GPU"


@functools.cache
def _broken(find: Callable[[], object]) -> str | None:
    if importlib.util.find_spec("mamba_ssm") is None:
        return "the package mamba-ssm is not installed"
    try:
        find()
    except Exception as error:  # an extension built for another torch may raise anything
        return f"mamba_ssm is installed but its kernels are not to be had: {type(error).__name__}: {error}"
    return None


def _scan() -> tuple[Any, Any]:
    """Its forward and backward function, whose first and last lines must be those that we replace."""
    module = importlib.import_module(SCAN)
    forward, backward = module._mamba_chunk_scan_combined_fwd, module._mamba_chunk_scan_combined_bwd
    for function, names in ((forward, {FIRST}), (backward, {FIRST, LAST})):
        if not names <= set(function.__code__.co_names):
            raise AttributeError(f"{function.__name__} does not call {' and '.join(sorted(names))}")
    return forward, backward


def _step() -> Any:
    return importlib.import_module(STEP).selective_state_update


def scan_package(
    x_BLHP: Tensor, log_a_BLH: Tensor, B_BLGN: Tensor, C_BLGN: Tensor, w_BLH: Tensor | None, D_H: Tensor | None,
    state_BHPN: Tensor | None, segment_BL: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `ssd`. x, B and C are computed on in the widest of their dtypes, decays and states in float32."""
    dtype = functools.reduce(torch.promote_types, (x_BLHP.dtype, B_BLGN.dtype, C_BLGN.dtype))
    _check_single("ssd", dtype)
    x, B, C = (t.to(dtype) for t in (x_BLHP, B_BLGN, C_BLGN))
    x, B, C = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, B, C))
    log_a = log_a_BLH.float()
    w = torch.ones_like(log_a) if w_BLH is None else w_BLH.float()
    state = None if state_BHPN is None else state_BHPN.float().contiguous()
    # an initial state belongs to document 0
    segment = None if segment_BL is None else (segment_BL - segment_BL[:, :1]).to(torch.int32).contiguous()
    y, final = _Scan.apply(x, log_a, w, B, C, D_H, state, segment)
    return y.to(x_BLHP.dtype), final


@torch.no_grad()
def step_package(
    state_BHPN: Tensor, x_BHP: Tensor, log_a_BH: Tensor, B_BGN: Tensor, C_BGN: Tensor, w_BH: Tensor | None,
    D_H: Tensor | None,
) -> Tensor:  # fmt: skip
    """As `ssd_step`, for a contiguous float32 state.

    Its A belongs to a head: rows of the batch are given as heads, with A = log_a, dt = 1 and w x for x.
    """
    batch, heads, P, N = state_BHPN.shape
    _check_single("ssd_step", state_BHPN.dtype)
    if not state_BHPN.is_contiguous():
        rule, do = "'mamba_ssm' needs a contiguous state", "Use the state that ssd returned."
        raise fail("ssd_step.state_BHPN", rule, state_BHPN.stride(), do)
    if batch * heads > MOST:
        raise fail("ssd_step.backend", f"'mamba_ssm' takes {MOST} rows x heads", batch * heads, "Use backend 'triton'.")
    x = x_BHP.float()
    weighted = x if w_BH is None else x * w_BH.float().unsqueeze(-1)
    one = x.new_ones(1, batch * heads, 1).expand(-1, -1, P)
    # it cannot do without
    zero = x.new_zeros(batch * heads, 1).expand(-1, P)
    y_BHP: Tensor = _step()(
        state_BHPN.view(1, batch * heads, P, N),
        weighted.reshape(1, batch * heads, P),
        one,
        log_a_BH.float().reshape(-1, 1, 1).expand(-1, P, N),
        B_BGN.reshape(1, -1, N),
        C_BGN.reshape(1, -1, N),
        D=zero,
        dt_bias=zero,
    ).view(batch, heads, P)
    if D_H is not None:
        y_BHP = y_BHP + D_H.float().unsqueeze(-1) * x
    return y_BHP.to(x_BHP.dtype)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, log_a, w, B, C, D, initial, segment):  # type: ignore[no-untyped-def]
        run = _with(_scan()[0], **{FIRST: _decay(log_a, w)})
        options = {"D": D, "initial_states": initial, "seq_idx": segment}
        y, _, _, _, _, final, *_ = run(x, w, _unused(w), B, C, CHUNK, **options)
        ctx.save_for_backward(x, log_a, w, B, C, D, initial, segment, y)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal):  # type: ignore[no-untyped-def]
        x, log_a, w, B, C, D, initial, segment, y = ctx.saved_tensors
        run = _with(_scan()[1], **{FIRST: _decay(log_a, w), LAST: lambda dlog_a, dw, *_, **__: (dw, dlog_a, None)})
        options = {"D": D, "initial_states": initial, "dfinal_states": dfinal, "seq_idx": segment}
        gradients = run(dy, x, w, _unused(w), B, C, y, CHUNK, **options)
        dx, dw_BHKQ, dlog_a_BHKQ, dB, dC, dD, _, _, dinitial = gradients
        dlog_a, dw = (t.flatten(2)[..., : x.shape[1]].transpose(1, 2) for t in (dlog_a_BHKQ, dw_BHKQ))
        return dx, dlog_a, dw, dB, dC, dD, None if dinitial is None else dinitial.float(), None


def _with(function: Any, **named: Any) -> Any:
    """The same function, which finds these where it looks for its module's."""
    made = types.FunctionType(
        function.__code__, {**function.__globals__, **named}, function.__name__, function.__defaults__
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _decay(log_a_BLH: Tensor, w_BLH: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    """What stands for its `_chunk_cumsum_fwd`: cumulative log-decays and weights, [B, H, K, Q]."""
    pad = -log_a_BLH.shape[1] % CHUNK
    log_a, w = (F.pad(t.transpose(1, 2), (0, pad)).unflatten(2, (-1, CHUNK)) for t in (log_a_BLH, w_BLH))
    both = log_a.cumsum(-1), w.contiguous()
    return lambda *_, **__: both


def _unused(w_BLH: Tensor) -> Tensor:
    """In the place of A, of which only the shape is looked at."""
    return w_BLH.new_ones(w_BLH.shape[2])


def _check_single(op: str, dtype: torch.dtype) -> None:
    if dtype == torch.float64:
        raise fail(f"{op}.backend", "'mamba_ssm' computes in float32", dtype, "Use backend 'chunked'.")
