"""Fixtures of the kernel tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Uninitialised memory holds NaN, so that reading what was never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills torch.empty and its kin
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
