"""Value and output path of one head together, the best pair of P channels: for mixers that are linear in it.

With identity convolution, constant gate and no norm a head adds `M_h [U, 1] W_vo` to the layer's output. `W_vo` is a
ridge regression on `X = M_h [U, 1]`, cut to rank P in the metric of what it is fitted on: with `K = X'X + ridge` and V
the P foremost eigenvectors of `W'KW`, no other map of rank P is closer to W than `(W V) V'`. W V becomes the rows of x
and their bias, V' the columns of out_proj. Heads take turns, each on what the others leave.

B batch, L length, D model width, H heads, P head width, I = D + 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmorph.kernels.ssd import ssd

from .mixers import ScanInputs
from .mixers.discrete_mamba2 import DiscreteMamba2Mixer
from .moments import Moments
from .start import conv_bias, conv_rows

RIDGES = (1.0, 10.0, 100.0)
SWEEPS = 1


@torch.no_grad()
def fit_values(mixer: DiscreteMamba2Mixer, inputs: Sequence[Tensor], targets: Sequence[Tensor], judge: int) -> None:
    """Refits rows of x and columns of out_proj, head by head, in place.

    Args:
        inputs, targets: what enters the layer and what should leave it, [B, L, D] each; the last `judge` choose each
            head's ridge.
    """
    left = [y - mixer(u)[0] for u, y in zip(inputs, targets, strict=True)]
    for _ in range(SWEEPS):
        for head in range(mixer.shape.heads):
            _refit(mixer, head, inputs, left, len(inputs) - judge)


def _refit(mixer: DiscreteMamba2Mixer, head: int, inputs: Sequence[Tensor], left: list[Tensor], split: int) -> None:
    width = mixer.shape.head_dim
    block = slice(head * width, (head + 1) * width)
    rows_PD, bias_P, out_DP = conv_rows(mixer)[block], conv_bias(mixer)[block], mixer.out_proj.weight[:, block]
    into_PI, out = torch.cat([rows_PD, bias_P.unsqueeze(1)], 1), out_DP.clone()
    prior_DI = out @ into_PI
    mixed = [_mixed(mixer, head, u) for u in inputs]
    fitted, judged = (Moments(prior_DI.shape[1], prior_DI.shape[0], prior_DI.device) for _ in range(2))
    for b, x_BLI in enumerate(mixed):
        left[b] = left[b] + F.linear(x_BLI, prior_DI)
        (fitted if b < split else judged).add(x_BLI, left[b])
    pairs = [(into_PI.double(), out.double()), *(_pair(fitted, ridge, prior_DI, width) for ridge in RIDGES)]
    into_PI, out = min(pairs, key=lambda pair: judged.error(pair[1] @ pair[0]))
    out_DP.copy_(out)
    rows_PD.copy_(into_PI[:, :-1])
    bias_P.copy_(into_PI[:, -1])
    new_DI = (out @ into_PI).to(prior_DI.dtype)
    for b, x_BLI in enumerate(mixed):
        left[b] = left[b] - F.linear(x_BLI, new_DI)


def _mixed(mixer: DiscreteMamba2Mixer, head: int, u_BLD: Tensor) -> Tensor:
    """M_h [U, 1], [B, L, D + 1]: what the head's value path is applied to, since both maps commute."""
    s: ScanInputs = mixer.scan_inputs(u_BLD)
    one = torch.cat([u_BLD, torch.ones_like(u_BLD[..., :1])], -1).unsqueeze(2)
    of = slice(head, head + 1)
    group = mixer.shape.group_of(head)
    B, C = (t[:, :, group : group + 1] for t in (s.B_BLGN, s.C_BLGN))
    return ssd(one, s.log_a_BLH[..., of], B, C, D_H=s.D_H[of])[0].squeeze(2)


def _pair(moments: Moments, ridge: float, prior_DI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best maps [P, I] and [D, P] of one ridge, of equal size."""
    weight_DI = moments.solve(ridge, prior_DI)
    metric_II = moments.gram_FF + torch.diag(ridge * moments.gram_FF.diagonal())
    out_DP = torch.linalg.eigh(weight_DI @ metric_II @ weight_DI.T).eigenvectors[:, -rank:]
    into_PI = out_DP.T @ weight_DI
    even = (out_DP.norm() / into_PI.norm().clamp_min(1e-30)).sqrt()
    return into_PI * even, out_DP / even
