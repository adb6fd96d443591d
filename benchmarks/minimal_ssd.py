"""The scan as a short program of einsums over chunks, for autograd: what the Mamba-2 paper derives and lists.

Equations of section 6 (arXiv:2405.21060): with L[t, s] = a_{s+1} ... a_t, a chunk's outputs are (L o C B^T) X from
within it, and C_t (a_1 ... a_t) S from the state S before it; states pass from chunk to chunk by the same kind of
matrix L, of whole chunks.

B batch, L length, H heads, P head width, N state width, K chunks, Q chunk length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def decays(log_a: Tensor) -> Tensor:
    """exp of the sum of the log-decays after s up to t, [..., t, s]; 0 where s is later than t."""
    sums = log_a.cumsum(-1)
    later = torch.ones(log_a.shape[-1], log_a.shape[-1], dtype=torch.bool, device=log_a.device).triu(1)
    return (sums.unsqueeze(-1) - sums.unsqueeze(-2)).masked_fill(later, float("-inf")).exp()


def minimal_ssd(x_BLHP: Tensor, log_a_BLH: Tensor, B_BLHN: Tensor, C_BLHN: Tensor, chunk: int) -> Tensor:
    """y_t = S_t C_t, S_t = exp(log_a_t) S_{t-1} + x_t B_t^T, for a length that the chunk length divides.

    Decays are computed in their own dtype and applied in that of x.
    """
    x, B, C = (t.unflatten(1, (-1, chunk)) for t in (x_BLHP, B_BLHN, C_BLHN))
    log_a_BHKQ = log_a_BLH.unflatten(1, (-1, chunk)).permute(0, 3, 1, 2)
    sums_BHKQ = log_a_BHKQ.cumsum(-1)
    last_BHK = sums_BHKQ[..., -1]
    within = torch.einsum("bkthn,bkshn,bhkts,bkshp->bkthp", C, B, decays(log_a_BHKQ).to(x.dtype), x)
    write_BHKQ, read_BHKQ = (t.exp().to(x.dtype) for t in (last_BHK.unsqueeze(-1) - sums_BHKQ, sums_BHKQ))
    added_BKHPN = torch.einsum("bkshn,bhks,bkshp->bkhpn", B, write_BHKQ, x)
    # the state before chunk k gathers what the chunks before it added
    passed_BHKK = decays(F.pad(last_BHK, (1, 0)))[:, :, :-1, 1:].to(x.dtype)
    before_BKHPN = torch.einsum("bhkj,bjhpn->bkhpn", passed_BHKK, added_BKHPN)
    across = torch.einsum("bkthn,bkhpn,bhkt->bkthp", C, before_BKHPN, read_BHKQ)
    return (within + across).flatten(1, 2)
