"""Fixtures of the kernel tests. Triton kernels run on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

from ssmorph.kernels.common.dispatch import Backends
from ssmorph.kernels.ssd import BACKENDS, STEPS

# where the tests' tensors live
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

if importlib.util.find_spec("triton") and os.environ.get("TRITON_INTERPRET") == "1":
    from .interpreter import mend

    mend()

# what is compared against, what an interpreter runs, and packages that need a GPU
ELSEWHERE = ("reference", "triton", "causal_conv1d", "mamba_ssm", "liger")


def on_cpu(backends: Backends) -> list[str]:
    """The names of an operation's backends that are made for a CPU."""
    return [name for name in backends.names if name not in ELSEWHERE]


def runnable(backends: Backends, name: str) -> str:
    """The name, or skips with the reason why that backend does not run here."""
    reason = backends.refusal(name, torch.device("cpu"))
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return name


@pytest.fixture(params=on_cpu(BACKENDS))
def scan_backend(request: pytest.FixtureRequest) -> str:
    """Each backend of the scan that is made for a CPU."""
    return runnable(BACKENDS, request.param)


@pytest.fixture(params=on_cpu(STEPS))
def step_backend(request: pytest.FixtureRequest) -> str:
    """Each backend of the scan's step that is made for a CPU."""
    return runnable(STEPS, request.param)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Uninitialised memory holds NaN, so that reading what was never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills torch.empty and its kin
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def needs_triton() -> None:
    """Skips by name where the package is missing, as on platforms without wheels of it."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the package triton is not installed")
