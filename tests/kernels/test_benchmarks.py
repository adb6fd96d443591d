"""What benchmarks.kernels compares: the paper's listing is the scan, and every backend for a CPU gets its row."""

from __future__ import annotations

import pytest
import torch
from benchmarks import measure
from benchmarks.measure import fastest_chunks, paired
from benchmarks.minimal_ssd import minimal_ssd
from benchmarks.scan_cases import ours, ssd_case

from ssmorph.kernels.common.dispatch import Backends
from ssmorph.kernels.ssd import BACKENDS, ssd

from .conftest import on_cpu
from .test_ssd import inputs


@pytest.mark.parametrize("chunk", [1, 32, 96])
def test_the_listing_is_the_scan(chunk: int) -> None:
    arguments = [inputs(batch=2, length=96, heads=3)[n] for n in ("x_BLHP", "log_a_BLH", "B_BLGN", "C_BLGN")]
    expected, _ = ssd(*arguments, backend="reference")
    torch.testing.assert_close(minimal_ssd(*arguments, chunk), expected, rtol=1e-10, atol=1e-10)


def test_all_calls_of_a_case_solve_one_problem() -> None:
    results = {name: call() for name, call in ssd_case("cpu", torch.float32, 1, 512, 2, True).calls.items()}
    first = next(iter(results.values()))
    assert sum(name.startswith("ours") for name in results) <= len(on_cpu(BACKENDS))
    for name, gradients in results.items():
        for own, expected in zip(gradients, first, strict=True):
            assert (own - expected).abs().max() <= 1e-4 * expected.abs().max(), name


def test_a_row_for_each_backend_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSMORPH_BACKEND", raising=False)
    targets = dict.fromkeys(("native", "chunked", "reference", "triton", "gpu"), "math:sqrt")
    table = Backends("op", targets, refuses={"gpu": lambda device: "needs a GPU"})
    assert list(ours(table, "cpu", lambda name: lambda: name)) == ["ours (native)", "ours (chunked)"]


def test_one_of_each_chunk_length_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "seconds", lambda call, device: call())
    calls = {"ours (a)": int, "peer, chunks of 1": lambda: 2.0, "peer, chunks of 2": lambda: 1.0, "other": int}
    assert list(fastest_chunks(calls, "cpu")) == ["ours (a)", "peer, chunks of 2", "other"]


def test_ratios_are_of_the_same_round() -> None:
    assert paired([2.0, 40.0, 9.0], [1.0, 10.0, 3.0]) == 3.0
