"""Launches the Triton scan: at most two kernels forwards, four backwards [Mamba-2, section 6].

B batch, L length, H heads, G groups, P head width, N state width.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssmorph.errors import fail

from ..common.launch import launch, recorded
from ..common.shipped import Shipped
from .triton_kernels import finish_kernel, sections_kernel, step_kernel, walk_kernel
from .triton_plan import LAUNCHES, Plan, Shape, block, row_for

# what the modes of walk_kernel compute
NAMES = ("y", "dC", "dx", "dB")


def ssd_triton(
    x_BLHP: Tensor,
    log_a_BLH: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    w_BLH: Tensor | None,
    D_H: Tensor | None,
    state_BHPN: Tensor | None,
    segment_BL: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `ssd`. x, B and C are computed on in the widest of their dtypes, sums and states in float32."""
    dtype = functools.reduce(torch.promote_types, (x_BLHP.dtype, B_BLGN.dtype, C_BLGN.dtype))
    if dtype == torch.float64:
        raise fail("ssd.backend", "'triton' computes in float32", dtype, "Use backend 'chunked'.")
    row_for(x_BLHP.device, dtype, max(x_BLHP.shape[-1], B_BLGN.shape[-1]))
    x, B, C = (_rows(t.to(dtype)) for t in (x_BLHP, B_BLGN, C_BLGN))
    segment = None if segment_BL is None else segment_BL.to(torch.int32).contiguous()
    state = None if state_BHPN is None else state_BHPN.float().contiguous()
    D = None if D_H is None else D_H.contiguous()
    y, final = _Scan.apply(x, log_a_BLH.float(), B, C, w_BLH, D, state, segment)
    return y.to(x_BLHP.dtype), final


def _rows(t: Tensor) -> Tensor:
    """With unit stride in the last dimension."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _strides(t: Tensor, share: int) -> tuple[int, int, int, int]:
    batch, token, head = t.stride()[:3]
    return batch, token, head, share


class _Walks:
    """The inputs that all walks of one pass share, as the kernels take them."""

    def __init__(self, plan: Plan, log_a: Tensor, w: Tensor | None, D: Tensor | None, segment: Tensor | None) -> None:
        self.plan, self.log_a, self.segment = plan, log_a, segment
        self.w, self.D = w, D
        self.sizes = (plan.length, plan.chunks, plan.sections, plan.heads)
        self.decay = (*log_a.stride(), *(log_a if w is None else w).stride())

    def sections(self, k: Tensor, v: Tensor, local: Tensor, carry: Tensor) -> None:
        """Each section's own state, forwards; k holds the groups, v the heads."""
        plan = self.plan
        if plan.sections == 1:
            return
        shape = Shape.of(plan, wide_state=True)
        launch(
            sections_kernel, (plan.batch * plan.heads, plan.sections - 1, shape.tiles),
            k, v, self.log_a, self._or(self.w), self._or(self.segment), local, carry, *self.sizes,
            *_strides(k, plan.group), *_strides(v, 1), *self.decay, *shape.state,
            name=f"ssd.sections {plan.size}", **shape.options, **shape.widths,
            WEIGHTS=self.w is not None, SEGMENTS=self.segment is not None,
        )  # fmt: skip

    def walk(
        self, mode: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, other: Tensor, local: Tensor, carry: Tensor, *,
        shares: tuple[int, int, int, int], enter: Tensor | None = None, leave: Tensor | None = None,
        dot: Tensor | None = None, skip: Tensor | None = None, following: tuple[Tensor, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """One walk; `shares` says how many heads read one row of q, k, v and other."""
        plan = self.plan
        shape = Shape.of(plan, wide_state=mode in (0, 2))
        more = following is not None and plan.sections > 1
        share_q, share_k, share_v, share_other = shares
        launch(
            walk_kernel, (plan.batch * plan.heads, plan.sections, shape.tiles * (1 + more)),
            q, k, v, out, other, self.log_a, self._or(self.w), self._or(self.D), self._or(self.segment),
            self._or(enter), self._or(leave), local, carry, self._or(dot), self._or(skip),
            *(following or (local, carry)), *self.sizes, plan.batch, shape.tiles,
            *_strides(q, share_q), *_strides(k, share_k), *_strides(v, share_v), *_strides(other, share_other),
            *out.stride()[:3], *self.decay, *shape.state,
            name=f"ssd.walk {NAMES[mode]} {plan.size}", **shape.options, **shape.widths,
            MODE=mode, WEIGHTS=self.w is not None, SKIP=self.D is not None,
            SEGMENTS=self.segment is not None, ENTER=enter is not None, LEAVE=leave is not None, NEXT=more,
        )  # fmt: skip

    def _or(self, t: Tensor | None) -> Tensor:
        """A pointer that a kernel may be given but does not follow."""
        return self.log_a if t is None else t


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, log_a, B, C, w, D, initial, segment):  # type: ignore[no-untyped-def]
        plan = Plan.of(x, B)
        y = x.new_empty(x.shape)
        final = x.new_empty(plan.batch, plan.heads, plan.P, plan.N, dtype=torch.float32)
        local, carry = plan.local(x)
        walks = _Walks(plan, log_a, w, D, segment)
        walks.sections(B, x, local, carry)
        g = plan.group
        walks.walk(0, C, B, x, y, x, local, carry, shares=(g, g, 1, 1), enter=initial, leave=final)
        ctx.save_for_backward(x, log_a, B, C, w, D, initial, segment, local, carry, final)
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal):  # type: ignore[no-untyped-def]
        x, log_a, B, C, w, D, initial, segment, local, carry, final = ctx.saved_tensors
        plan, g = Plan.of(x, B), x.shape[2] // B.shape[2]
        dy = torch.zeros_like(x) if dy is None else _rows(dy)
        dfinal = None if dfinal is None else dfinal.contiguous()
        walks = _Walks(plan, log_a, w, D, segment)
        following = plan.local(x)
        dx, dB, dC = x.new_empty(x.shape), *(x.new_empty(*x.shape[:3], plan.N, dtype=_sum_type(t, g)) for t in (B, C))
        read, write, dw_parts, skip, dinitial = _parts(plan, x)
        walks.walk(
            1, dy, x, B, dC, C, local, carry, shares=(1, 1, g, g), enter=initial, dot=read, skip=skip,
            following=following,
        )  # fmt: skip
        walks.walk(2, B, C, dy, dx, x, *following, shares=(g, g, 1, 1), enter=dfinal, leave=dinitial, dot=dw_parts)
        walks.walk(3, x, dy, C, dB, B, *following, shares=(1, 1, g, g), enter=dfinal, dot=write)
        dlog_a, dw, dD = _finish(plan, read, write, dw_parts, w, D, skip, final, dfinal)
        dB, dC = _over_groups(dB, B, g), _over_groups(dC, C, g)
        dw_D = (None if p is None else d.to(p.dtype) for d, p in ((dw, w), (dD, D)))
        return dx, dlog_a, dB, dC, *dw_D, None if initial is None else dinitial, None


def _sum_type(t: Tensor, group: int) -> torch.dtype:
    return t.dtype if group == 1 else torch.float32


def _over_groups(per_head: Tensor, like: Tensor, group: int) -> Tensor:
    """Sums the gradients of the heads that share a group."""
    return per_head if group == 1 else per_head.unflatten(2, (-1, group)).sum(3).to(like.dtype)


def _parts(plan: Plan, x: Tensor) -> tuple[Tensor, ...]:
    """Buffers of what tiles and sections leave: <C, dC>, <B, dB>, dw and dD in parts, and d(initial state)."""
    shape = (plan.batch, plan.heads, plan.length)
    of_n, of_p = ((Shape.of(plan, wide).tiles, *shape) for wide in (False, True))
    sizes = (of_n, of_n, of_p, (*shape[:2], plan.sections), (*shape[:2], plan.P, plan.N))
    return tuple(x.new_empty(size, dtype=torch.float32) for size in sizes)


def _finish(
    plan: Plan, read: Tensor, write: Tensor, dw_parts: Tensor, w: Tensor | None, D: Tensor | None, skip: Tensor,
    final: Tensor, dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shape = (plan.batch, plan.length, plan.heads)
    dlog_a, dw = (read.new_empty(shape) for _ in range(2))
    dD = read.new_empty(plan.heads)
    launch(
        finish_kernel, (plan.heads,),
        read, write, dw_parts, skip, final, final if dfinal is None else dfinal, dlog_a, dw, dD,
        plan.length, plan.heads, plan.batch, read.shape[0], dw_parts.shape[0], skip.shape[2],
        plan.P * plan.N, BLOCK_STATE=512, BLOCK=512, BLOCK_PARTS=1 << (skip.shape[2] - 1).bit_length(),
        name=f"ssd.finish {plan.size}", warps=8, stages=1,
        WEIGHTS=w is not None, SKIP=D is not None, LEAVE=dfinal is not None,
    )  # fmt: skip
    return dlog_a, dw, dD


@torch.no_grad()
def ssd_step_triton(
    state_BHPN: Tensor, x_BHP: Tensor, log_a_BH: Tensor, B_BGN: Tensor, C_BGN: Tensor, w_BH: Tensor | None,
    D_H: Tensor | None,
) -> Tensor:  # fmt: skip
    """As `ssd_step`, for a contiguous float32 state."""
    batch, heads, P, N = state_BHPN.shape
    if state_BHPN.dtype != torch.float32 or not state_BHPN.is_contiguous():
        got = (state_BHPN.dtype, state_BHPN.stride())
        raise fail("ssd_step.state_BHPN", "'triton' needs contiguous float32", got, "Use the state that ssd returned.")
    x, log_a, B, C = (t.contiguous() for t in (x_BHP, log_a_BH, B_BGN, C_BGN))
    w, D = (log_a if t is None else t.contiguous() for t in (w_BH, D_H))
    y = torch.empty_like(x)
    tile = min(16, block(P))
    launch(
        step_kernel, (batch * heads, -(-P // tile)),
        state_BHPN, x, log_a, w, B, C, D, y, heads, heads // B.shape[1],
        state_BHPN.stride(0), x.stride(0), log_a.stride(0), w.stride(0), B.stride(0), C.stride(0),
        P=P, N=N, BLOCK_P=tile, BLOCK_N=block(N), WEIGHTS=w_BH is not None, SKIP=D_H is not None,
        name=f"ssd.step P={P} N={N}", warps=2, stages=1,
    )  # fmt: skip
    return y


def shipped(arch: str, dtype: str) -> list[Shipped]:
    """Every kernel of a step of training and of decoding, for the usual widths."""
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    with recorded(arch) as kernels:
        for row in LAUNCHES[arch, kinds[dtype].itemsize]:
            _record(row.key, kinds[dtype])
    return kernels


def _record(width: int, dtype: torch.dtype) -> None:
    """One step on tensors without data: 4096 tokens and 4 heads, few enough that the sequence is cut."""
    heads = torch.empty(1, 4096, 4, width, dtype=dtype, device="meta", requires_grad=True)
    x, B, C = heads.clone(), heads.clone(), heads.clone()
    decay = torch.empty(1, 4096, 4, device="meta", requires_grad=True)
    D = torch.empty(4, device="meta", requires_grad=True)
    y, final = ssd_triton(x, -decay, B, C, decay.clone(), D, None, None)
    torch.autograd.backward([y, final], [torch.empty_like(y), torch.empty_like(final)])
    token = heads.detach()[:, 0]
    ssd_step_triton(final.detach(), token, decay.detach()[:, 0], token, token, decay.detach()[:, 0], D.detach())
