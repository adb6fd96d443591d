"""What stands for mamba-ssm where it cannot run: its functions with their arguments and layouts, by the reference.

Checks what the package takes for granted, and calls the two functions that our backend replaces where the package does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmorph.kernels.ssd import ssd, ssd_step


def _chunk_cumsum_fwd(*_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    raise AssertionError("decays come from the caller")


def _chunk_cumsum_bwd(*_: Any, **__: Any) -> tuple[Tensor, Tensor, None]:
    raise AssertionError("gradients go to the caller")


def _mamba_chunk_scan_combined_fwd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Any = None, z: Any = None,
    dt_bias: Any = None, initial_states: Any = None, seq_idx: Any = None,
) -> tuple[Any, ...]:  # fmt: skip
    decay = _chunk_cumsum_fwd(dt, A, chunk_size, dt_bias=dt_bias, dt_softplus=False)
    _, y, final = _solve(x, dt, A, B, C, chunk_size, decay, D, initial_states, seq_idx)
    return y.detach(), None, decay[1], decay[0], None, final.detach()


def _mamba_chunk_scan_combined_bwd(
    dout: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, out: Tensor, chunk_size: int, D: Any = None,
    z: Any = None, dt_bias: Any = None, initial_states: Any = None, dfinal_states: Any = None, seq_idx: Any = None,
) -> tuple[Any, ...]:  # fmt: skip
    dt_in = dt.clone()
    decay = _chunk_cumsum_fwd(dt_in, A, chunk_size, dt_bias=dt_bias, dt_softplus=False)
    leaves, y, final = _solve(x, dt, A, B, C, chunk_size, decay, D, initial_states, seq_idx)
    torch.testing.assert_close(y, out)
    torch.autograd.backward([y, final], [dout, dfinal_states])
    of = {name: leaf.grad for name, leaf in leaves.items()}
    ddA, ddt = (_chunks(of[name], chunk_size) for name in ("log_a_BLH", "w_BLH"))
    ddt, dA, dbias = _chunk_cumsum_bwd(ddA, ddt, dt_in, A, dt_bias=dt_bias, dt_softplus=False, ddt=None)
    rest = of["B_BLGN"], of["C_BLGN"], of.get("D_H"), None, dbias, of.get("initial_state_BHPN")
    return of["x_BLHP"], ddt, dA, *rest


def mamba_chunk_scan_combined(*_: Any) -> None:
    raise AssertionError("knows no decay apart from its weight")


def selective_state_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor
) -> Tensor:
    """One row of as many heads as there are; A, dt and the rest are the same in all of a head."""
    rows, heads, P, N = state.shape
    assert (rows, heads, P) == x.shape == dt.shape
    assert A.shape == (heads, P, N)
    assert A.stride()[1:] == (0, 0)
    assert dt.stride(-1) == dt_bias.stride(-1) == D.stride(-1) == 0
    log_a, w = (dt + dt_bias)[..., 0] * A[:, 0, 0], (dt + dt_bias)[..., 0]
    return ssd_step(state, x, log_a, B.to(x.dtype), C.to(x.dtype), w_BH=w, D_H=D[:, 0], backend="reference")


def _tokens(t_BHKQ: Tensor, length: int) -> Tensor:
    return t_BHKQ.flatten(2)[..., :length].transpose(1, 2)


def _chunks(t_BLH: Tensor, chunk_size: int) -> Tensor:
    return F.pad(t_BLH.transpose(1, 2), (0, -t_BLH.shape[1] % chunk_size)).unflatten(2, (-1, chunk_size))


def _solve(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, decay: tuple[Tensor, Tensor], D: Any,
    initial_states: Any, seq_idx: Any,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:  # fmt: skip
    """Leaves, y and the final state."""
    (batch, length, heads), (cumulative, weights) = dt.shape, decay
    assert A.shape == (heads,)
    assert all(t.stride(-1) == 1 for t in (x, B, C))
    assert cumulative.shape == weights.shape == (batch, heads, -(-length // chunk_size), chunk_size)
    assert cumulative.dtype == weights.dtype == torch.float32
    # what pads the last chunk does not decay
    assert torch.equal(cumulative[..., -1, -1], cumulative[..., -1, (length - 1) % chunk_size])
    # an initial state belongs to document 0
    assert seq_idx is None or (seq_idx.dtype == torch.int32 and not seq_idx[:, 0].any())
    log_a = cumulative.diff(dim=-1, prepend=torch.zeros_like(cumulative[..., :1]))
    leaves = {"x_BLHP": x, "log_a_BLH": _tokens(log_a, length), "B_BLGN": B, "C_BLGN": C}
    leaves |= {"w_BLH": _tokens(weights, length), "D_H": D, "initial_state_BHPN": initial_states}
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items() if t is not None}
    with torch.enable_grad():
        y, final = ssd(**leaves, segment_BL=seq_idx, backend="reference")
    return leaves, y, final
