"""The selective scan in chunks of Q tokens: matrix products inside, a short loop over states [Mamba-2, section 6].

Forward and backward are written out, because autograd keeps five Q x Q tensors alive where one recomputed one does.
The gradient of the log-decay: raising the cumulative decay at t scales C_t up and B_t down, hence
d log_a = reverse-cumsum(<C, dC> - <B, dB>), plus <S, dS> of the final state at the last token.

B batch, L length, H heads, P head width, N state width, Z = B*H, K chunks, Q chunk length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64


def ssd_chunked(
    x_BLHP: Tensor, log_a_BLH: Tensor, B_BLHN: Tensor, C_BLHN: Tensor, state_BHPN: Tensor, segment_BL: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Outputs [B, L, H, P] and the state after the last token; x already holds the weight w."""
    y_BLHP, state_BHPN = _Scan.apply(x_BLHP, log_a_BLH, B_BLHN, C_BLHN, state_BHPN, segment_BL)
    return y_BLHP, state_BHPN


def _to_chunks(t_BLHD: Tensor, chunk: int) -> Tensor:
    """[B, L, H, D] to contiguous [Z, K, Q, D], zero-padded to whole chunks."""
    batch, length, heads, width = t_BLHD.shape
    pad = -length % chunk
    if pad:
        t_BLHD = F.pad(t_BLHD, (0, 0, 0, 0, 0, pad))
    t = t_BLHD.reshape(batch, -1, chunk, heads, width).permute(0, 3, 1, 2, 4)
    return t.reshape(batch * heads, -1, chunk, width)


def _from_chunks(t_ZKQD: Tensor, batch: int, length: int) -> Tensor:
    """The inverse of `_to_chunks`."""
    zs, chunks, chunk, width = t_ZKQD.shape
    t = t_ZKQD.view(batch, zs // batch, chunks, chunk, width).permute(0, 2, 3, 1, 4)
    return t.reshape(batch, chunks * chunk, zs // batch, width)[:, :length]


class _Decay:
    """Decay factors of every chunk; document borders are masks, since a log-decay of -inf gives NaN gradients."""

    def __init__(self, log_a_BLH: Tensor, segment_BL: Tensor | None, chunk: int) -> None:
        heads = log_a_BLH.shape[2]
        cum_ZKQ = _to_chunks(log_a_BLH[..., None], chunk)[..., 0].cumsum(-1)
        last_ZK1 = cum_ZKQ[..., -1:]
        self.read_ZKQ = cum_ZKQ.exp()
        self.write_ZKQ = (last_ZK1 - cum_ZKQ).exp()
        self.carry_ZK = last_ZK1[..., 0].exp()
        later = torch.full((chunk, chunk), float("-inf"), dtype=cum_ZKQ.dtype, device=cum_ZKQ.device).triu(1)
        # clamped, because rounding can leave a difference just above 0 that a long chunk would amplify
        self.pair_ZKQQ = (cum_ZKQ.unsqueeze(-1) - cum_ZKQ.unsqueeze(-2)).clamp_(max=0).add_(later).exp_()
        if segment_BL is not None:
            self._mask(segment_BL, chunk, heads)

    def _mask(self, segment_BL: Tensor, chunk: int, heads: int) -> None:
        pad = -segment_BL.shape[1] % chunk
        # padding continues the last document, so that the final state survives it
        segment_BL = torch.cat([segment_BL, segment_BL[:, -1:].expand(-1, pad)], dim=1)
        segment_BKQ = segment_BL.reshape(segment_BL.shape[0], -1, chunk)
        before_BK = torch.cat([segment_BKQ[:, :1, 0], segment_BKQ[:, :-1, -1]], dim=1)
        last_BK = segment_BKQ[..., -1]

        def heads_of(mask: Tensor) -> Tensor:
            return mask.repeat_interleave(heads, dim=0).to(self.read_ZKQ.dtype)

        self.read_ZKQ = self.read_ZKQ * heads_of(segment_BKQ == before_BK[..., None])
        self.write_ZKQ = self.write_ZKQ * heads_of(segment_BKQ == last_BK[..., None])
        self.carry_ZK = self.carry_ZK * heads_of(before_BK == last_BK)
        self.pair_ZKQQ.mul_(heads_of(segment_BKQ[..., :, None] == segment_BKQ[..., None, :]))


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BLHP, log_a_BLH, B_BLHN, C_BLHN, state_BHPN, segment_BL):  # type: ignore[no-untyped-def]
        batch, length = x_BLHP.shape[:2]
        chunk = min(CHUNK, length)
        x, B, C = (_to_chunks(t, chunk) for t in (x_BLHP, B_BLHN, C_BLHN))
        decay = _Decay(log_a_BLH, segment_BL, chunk)
        added_ZKNP = (B * decay.write_ZKQ.unsqueeze(-1)).transpose(-1, -2) @ x
        before_ZKNP = torch.empty_like(added_ZKNP)
        state_ZNP = state_BHPN.flatten(0, 1).transpose(-1, -2)
        for k in range(added_ZKNP.shape[1]):
            before_ZKNP[:, k] = state_ZNP
            state_ZNP = torch.addcmul(added_ZKNP[:, k], state_ZNP, decay.carry_ZK[:, k, None, None])
        y = (C @ B.transpose(-1, -2)).mul_(decay.pair_ZKQQ) @ x
        y.flatten(0, 1).baddbmm_((C * decay.read_ZKQ.unsqueeze(-1)).flatten(0, 1), before_ZKNP.flatten(0, 1))
        ctx.save_for_backward(x, B, C, log_a_BLH, before_ZKNP, state_ZNP, segment_BL)
        ctx.length = length
        final_BHPN = state_ZNP.transpose(-1, -2).reshape(state_BHPN.shape)
        return _from_chunks(y, batch, length), final_BHPN

    @staticmethod
    def backward(ctx, dy_BLHP, dfinal_BHPN):  # type: ignore[no-untyped-def]
        x, B, C, log_a_BLH, before_ZKNP, final_ZNP, segment_BL = ctx.saved_tensors
        batch, length, chunk = log_a_BLH.shape[0], ctx.length, x.shape[2]
        decay = _Decay(log_a_BLH, segment_BL, chunk)
        read, write = decay.read_ZKQ.unsqueeze(-1), decay.write_ZKQ.unsqueeze(-1)
        dy = _to_chunks(dy_BLHP, chunk)

        dstate_ZKNP, dinitial_ZNP = _state_gradients((C * read).transpose(-1, -2) @ dy, decay.carry_ZK, dfinal_BHPN)
        mixed_ZKQQ = (C @ B.transpose(-1, -2)).mul_(decay.pair_ZKQQ)
        dx = mixed_ZKQQ.transpose(-1, -2) @ dy
        dx.flatten(0, 1).baddbmm_((B * write).flatten(0, 1), dstate_ZKNP.flatten(0, 1))
        dscore_ZKQQ = (dy @ x.transpose(-1, -2)).mul_(decay.pair_ZKQQ)
        dC = (dy @ before_ZKNP.transpose(-1, -2)).mul_(read)
        dC.flatten(0, 1).baddbmm_(dscore_ZKQQ.flatten(0, 1), B.flatten(0, 1))
        dB = (x @ dstate_ZKNP.transpose(-1, -2)).mul_(write)
        dB.flatten(0, 1).baddbmm_(dscore_ZKQQ.transpose(-1, -2).flatten(0, 1), C.flatten(0, 1))

        dcum_ZL = ((C * dC).sum(-1) - (B * dB).sum(-1)).flatten(1)
        dcum_ZL[:, -1] += (final_ZNP * dfinal_BHPN.flatten(0, 1).transpose(-1, -2)).sum((-1, -2))
        dlog_a_ZL = dcum_ZL.flip(-1).cumsum(-1).flip(-1)[:, :length]
        dlog_a_BLH = dlog_a_ZL.view(batch, -1, length).transpose(1, 2)
        dx, dB, dC = (_from_chunks(t, batch, length) for t in (dx, dB, dC))
        return dx, dlog_a_BLH, dB, dC, dinitial_ZNP.transpose(-1, -2).reshape(dfinal_BHPN.shape), None


def _state_gradients(dbefore_ZKNP: Tensor, carry_ZK: Tensor, dfinal_BHPN: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the state after each chunk, from what each reads of the one before; and of the initial state."""
    dstate_ZNP = dfinal_BHPN.flatten(0, 1).transpose(-1, -2)
    dafter_ZKNP = torch.empty_like(dbefore_ZKNP)
    for k in reversed(range(dbefore_ZKNP.shape[1])):
        dafter_ZKNP[:, k] = dstate_ZNP
        dstate_ZNP = torch.addcmul(dbefore_ZKNP[:, k], dstate_ZNP, carry_ZK[:, k, None, None])
    return dafter_ZKNP, dstate_ZNP
