"""Runs of these tests compute alike: what a run measures about the machine would differ when the machine is busy."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ssmorph.stages import pipeline


@pytest.fixture(autouse=True, scope="session")
def _same_machine() -> Iterator[None]:
    """One thread and torch's own products, as if both had been measured to be best."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "choose_threads", lambda: 1)
        patch.setattr(pipeline, "choose_products", lambda: "default")
        yield
