"""How torch computes here: products are exact whichever library makes them, and measuring leaves torch as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ssmorph.stages.machine import FLOAT32_ERROR, choose_products, choose_threads, product_error, set_products


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    yield
    torch.set_float32_matmul_precision(precision)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("wanted", ["default", "onednn"])
def test_products_are_exact_whichever_library_is_asked_for(wanted: str) -> None:
    assert set_products(wanted) in ("default", wanted)
    assert 0 < product_error() < FLOAT32_ERROR


def test_measuring_leaves_torch_as_it_was() -> None:
    before = torch.get_float32_matmul_precision(), torch.get_num_threads()
    assert choose_products() in ("default", "onednn")
    assert choose_threads() >= 1
    assert (torch.get_float32_matmul_precision(), torch.get_num_threads()) == before
