"""Mistakes in a call of the scan or of its step: the argument, the rule and what came are named, and nothing runs."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from ssmorph.kernels.ssd import BACKENDS, STEPS, ssd, ssd_step

from .test_ssd import inputs

CPU = torch.device("cpu")


def integers(*values: int) -> Tensor:
    return torch.tensor(values)


# on a call of length 8 with 4 heads, 2 groups, width 5 and state 3
SCAN: dict[str, tuple[dict[str, Any], str]] = {
    "x-3d": ({"x_BLHP": torch.zeros(8, 4, 5)}, r"x_BLHP: must be floating point \[B, L, H, P\]; got \(\(8, 4, 5\)"),
    "x-integer": ({"x_BLHP": torch.zeros(1, 8, 4, 5, dtype=torch.int64)}, r"x_BLHP: must be floating point.*int64"),
    "x-empty": ({"x_BLHP": torch.zeros(1, 0, 4, 5)}, r"x_BLHP: needs a token.*got \(1, 0, 4, 5\)"),
    "log_a-short": ({"log_a_BLH": torch.zeros(1, 7, 4)}, r"log_a_BLH: .*\(1, 8, 4\); got \(\(1, 7, 4\)"),
    "log_a-integer": ({"log_a_BLH": torch.zeros(1, 8, 4, dtype=torch.int32)}, r"log_a_BLH: must be floating.*int32"),
    "B-3d": ({"B_BLGN": torch.zeros(1, 8, 3)}, r"B_BLGN: must be floating point \[B, L, G, N\]"),
    "B-batch": ({"B_BLGN": torch.zeros(2, 8, 2, 3)}, r"B_BLGN: must begin with \(1, 8\).*got \(2, 8, 2, 3\)"),
    "C-short": ({"C_BLGN": torch.zeros(1, 7, 2, 3)}, r"C_BLGN: must begin with \(1, 8\).*got \(1, 7, 2, 3\)"),
    "C-state": ({"C_BLGN": torch.zeros(1, 8, 2, 4)}, r"C_BLGN: must have shape \(1, 8, 2, 3\), as B_BLGN; got"),
    "groups-3": ({"B_BLGN": torch.zeros(1, 8, 3, 3)}, r"B_BLGN: groups must divide the 4 heads; got \(3, 3\)"),
    "groups-0": ({"B_BLGN": torch.zeros(1, 8, 0, 3)}, r"B_BLGN: groups must divide the 4 heads; got \(0, 3\)"),
    "groups-8": ({"C_BLGN": torch.zeros(1, 8, 8, 3)}, r"C_BLGN: groups must divide the 4 heads; got \(8, 3\)"),
    "w": ({"w_BLH": torch.zeros(1, 8, 2)}, r"w_BLH: must be floating point of shape \(1, 8, 4\)"),
    "D": ({"D_H": torch.zeros(4, 5)}, r"D_H: must be floating point of shape \(4,\); got \(\(4, 5\)"),
    "state": ({"initial_state_BHPN": torch.zeros(1, 4, 3, 5)}, r"initial_state_BHPN: .*\(1, 4, 5, 3\); got"),
    "state-integer": (
        {"initial_state_BHPN": torch.zeros(1, 4, 5, 3, dtype=torch.int64)},
        r"initial_state_BHPN: must be floating point.*got .*torch\.int64",
    ),
    "segment": ({"segment_BL": torch.zeros(1, 7, dtype=torch.int64)}, r"segment_BL: must be integers of shape \(1, 8"),
    "segment-float": ({"segment_BL": torch.zeros(1, 8)}, r"segment_BL: must be integers.*float32"),
    "unsorted": ({"cu_seqlens": integers(0, 5, 3, 8)}, r"cu_seqlens: must ascend from 0 to 8; got \[0, 5, 3, 8\]"),
    "late": ({"cu_seqlens": integers(1, 8)}, r"cu_seqlens: must ascend from 0 to 8; got \[1, 8\]"),
    "short": ({"cu_seqlens": integers(0, 7)}, r"cu_seqlens: must ascend from 0 to 8; got \[0, 7\]"),
    "beyond": ({"cu_seqlens": integers(0, 9, 8)}, r"cu_seqlens: must ascend from 0 to 8"),
    "no-starts": ({"cu_seqlens": integers()}, r"cu_seqlens: must be integers \[documents \+ 1\]; got \(\(0,\)"),
    "starts-2d": ({"cu_seqlens": integers(0, 8)[None]}, r"cu_seqlens: must be integers \[documents \+ 1\]"),
    "starts-float": ({"cu_seqlens": torch.tensor([0.0, 8.0])}, r"cu_seqlens: must be integers.*float32"),
    "both-forms": (
        {"cu_seqlens": integers(0, 8), "segment_BL": torch.zeros(1, 8, dtype=torch.int64)},
        r"cu_seqlens: describes the one row of a batch of 1; got segment_BL too",
    ),
    "backend": ({"backend": "chunky"}, r"backend: must name a backend of ssd; got 'chunky'. Did you mean 'chunked'"),
}
STEP: dict[str, tuple[dict[str, Any], str]] = {
    "x-4d": ({"x_BHP": torch.zeros(1, 1, 4, 5)}, r"x_BHP: must be floating point \[B, H, P\]"),
    "log_a": ({"log_a_BH": torch.zeros(1, 4, 1)}, r"log_a_BH: must be floating point of shape \(1, 4\)"),
    "B-2d": ({"B_BGN": torch.zeros(1, 3)}, r"B_BGN: must be floating point \[B, G, N\]"),
    "B-batch": ({"B_BGN": torch.zeros(2, 2, 3)}, r"B_BGN: must begin with \(1,\)"),
    "C-state": ({"C_BGN": torch.zeros(1, 2, 4)}, r"C_BGN: must have shape \(1, 2, 3\), as B_BGN"),
    "groups": ({"B_BGN": torch.zeros(1, 3, 3)}, r"B_BGN: groups must divide the 4 heads; got \(3, 3\)"),
    "w": ({"w_BH": torch.zeros(4)}, r"w_BH: must be floating point of shape \(1, 4\)"),
    "D": ({"D_H": torch.zeros(1, 4)}, r"D_H: must be floating point of shape \(4,\)"),
    "state-shape": ({"state_BHPN": torch.zeros(1, 4, 3, 5)}, r"state_BHPN: .*shape \(1, 4, 5, 3\); got \(\(1, 4, 3, 5"),
    "state-bf16": (
        {"state_BHPN": torch.zeros(1, 4, 5, 3, dtype=torch.bfloat16)},
        r"state_BHPN: must be torch\.float32.*bfloat16",
    ),
    "state-double": (
        {"state_BHPN": torch.zeros(1, 4, 5, 3, dtype=torch.float64)},
        r"state_BHPN: must be torch\.float32.*float64",
    ),
    "backend": ({"backend": "chunky"}, r"backend: must name a backend of ssd_step; got 'chunky'"),
}


def scan_arguments() -> dict[str, Any]:
    return {name: t.float() for name, t in inputs(length=8, heads=4, groups=2, width=5, state=3).items()}


def step_arguments() -> dict[str, Any]:
    t = scan_arguments()
    token = {name.replace("BL", "B"): v[:, 0] for name, v in t.items() if "BL" in name}
    return token | {"D_H": t["D_H"], "state_BHPN": t["initial_state_BHPN"]}


@pytest.mark.parametrize("case", SCAN)
def test_scan(case: str) -> None:
    change, message = SCAN[case]
    arguments = scan_arguments()
    ssd(**arguments)
    with pytest.raises(ValueError, match=rf"^ssd\.{message}"):
        ssd(**(arguments | change))


def test_starts_describe_one_row() -> None:
    arguments = {name: t if name == "D_H" else torch.cat([t, t]) for name, t in scan_arguments().items()}
    with pytest.raises(ValueError, match=r"ssd\.cu_seqlens: describes the one row of a batch of 1; got batch 2"):
        ssd(**arguments, cu_seqlens=integers(0, 8))


@pytest.mark.parametrize("case", STEP)
def test_step(case: str) -> None:
    change, message = STEP[case]
    arguments = step_arguments()
    before = arguments["state_BHPN"].clone()
    with pytest.raises(ValueError, match=rf"^ssd_step\.{message}"):
        ssd_step(**(arguments | change))
    assert torch.equal(arguments["state_BHPN"], before)
    ssd_step(**arguments)
    assert not torch.equal(arguments["state_BHPN"], before)


@pytest.mark.parametrize("source", ["argument", "environment"])
def test_a_backend_that_cannot_run_is_never_replaced(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backend, where = "triton", r"{op}\.backend"
    if source == "environment":
        monkeypatch.setenv("SSMORPH_BACKEND", "triton")
        backend, where = None, "SSMORPH_BACKEND"
    for op, call, given in (("ssd", ssd, scan_arguments()), ("ssd_step", ssd_step, step_arguments())):
        with pytest.raises(ValueError, match=f"^{where.format(op=op)}: backend 'triton' must run on cpu; got .*triton"):
            call(**given, backend=backend)


@pytest.mark.parametrize("table", [BACKENDS, STEPS], ids=lambda table: table.op_name)
def test_every_refusal_has_a_reason(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in table.names:
        reason = table.refusal(name, CPU)
        if reason is not None:
            with pytest.raises(ValueError, match=f"backend '{name}' must run on cpu; got {re.escape(reason)}"):
                table.choose(name, CPU)
