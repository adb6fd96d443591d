"""The teacher's attention maps beside the student's mixing matrices: every head's error, and pictures of a few heads.

H heads, R cells along a side.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssmorph.convert.capture import MixerCall
from ssmorph.convert.mixers import Mixer, ScanMixer, scan_of
from ssmorph.kernels.mixing import mixing_maps

CELLS = 48
# what a cell above the diagonal holds, where there is nothing
ABSENT = -128


@torch.no_grad()
def matrices(mixers: dict[int, Mixer], calls: dict[int, MixerCall], resolution: int = CELLS) -> dict[str, Any]:
    """Errors of all heads and the pictures of the best, the median and the worst.

    A mixer's output is rescaled by its norm and projection, so a head's error is that at its best scale:
    min_c |c M - A| / |A| = sqrt(1 - cos^2(M, A)), over the cells of the maps. 0 is equal, 1 has nothing in common.
    """
    found: list[tuple[float, int, int]] = []
    kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for layer, mixer in sorted(mixers.items()):
        # a window and what is behind it have no one matrix
        scan = scan_of(mixer)
        if scan is None:
            continue
        own_HRR, taught_HRR = maps_of(*scan, calls[layer], resolution)
        for head, own, taught in zip(scan[1], own_HRR, taught_HRR, strict=True):
            found.append((head_error(own, taught), layer, head))
            kept[layer, head] = own, taught
    if not found:
        return {"errors": {}, "heads": []}
    order = sorted(found)
    chosen = {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]}
    layers = sorted({layer for _, layer, _ in found})
    return {
        "errors": {str(i): [e for e, layer, _ in found if layer == i] for i in layers},
        "heads": [
            {"name": name, "layer": layer, "head": head, "error": error,
             "student": picture(kept[layer, head][0]), "teacher": picture(kept[layer, head][1])}
            for name, (error, layer, head) in chosen.items()
        ],
    }  # fmt: skip


def maps_of(mixer: ScanMixer, heads: Sequence[int], call: MixerCall, resolution: int) -> tuple[Tensor, Tensor]:
    """The student's maps of all its heads, and the teacher's of these `heads`, on the teacher's inputs, [H, R, R]."""
    assert call.attended is not None
    s, a = mixer.scan_inputs(call.input_BLD), call.attended.of(heads)
    return mixing_maps(
        s.C_BLGN, s.B_BLGN, s.log_a_BLH, a.q_BHLP.transpose(1, 2), a.k_BGLP.transpose(1, 2), resolution=resolution,
        w_BLH=s.w_BLH, D_H=s.D_H, scale=a.scale, window=a.window, softcap=a.softcap, sinks_H=a.sinks_H,
        valid_BL=a.valid_BL,
    )  # fmt: skip


def head_error(own_RR: Tensor, taught_RR: Tensor) -> float:
    """sqrt(1 - cos^2) over the cells that hold something; 1 where either is all 0."""
    there = ~taught_RR.isnan()
    own, taught = own_RR[there].double(), taught_RR[there].double()
    sizes = own.norm() * taught.norm()
    cosine = float(own @ taught / sizes) if sizes > 0 else 0.0
    return max(0.0, 1 - cosine**2) ** 0.5


def picture(map_RR: Tensor) -> dict[str, Any]:
    """A map as signed bytes in base64, row by row: value = byte / 127 x scale; -128 where there is nothing."""
    scale = float(map_RR.nan_to_num().abs().max())
    levels = (map_RR.nan_to_num() / (scale or 1.0) * 127).round()
    cells = torch.where(map_RR.isnan(), torch.tensor(float(ABSENT), device=map_RR.device), levels).to(torch.int8)
    encoded = base64.b64encode(cells.cpu().contiguous().numpy().tobytes()).decode()
    return {"size": map_RR.shape[0], "scale": scale, "cells": encoded}
