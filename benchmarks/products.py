"""Which library multiplies float32 matrices faster here, and how exactly: `python -m benchmarks.products`.

CPU time of a SmolLM2-135M MLP, forward and backward over 512 tokens, one thread, the two in turn; the ratio is the
median of paired rounds. The peer is torch's default.
"""

from __future__ import annotations

import statistics
import time

import torch

from ssmorph.stages.machine import Products, choose_products, product_error, set_products

ROUNDS, REPEATS = 15, 6


def mlp_time(products: Products) -> float:
    """Seconds of CPU time of one pass forward and backward."""
    set_products(products)
    up, down = torch.nn.Linear(576, 3072), torch.nn.Linear(3072, 576)
    x = torch.randn(512, 576, requires_grad=True)
    started = time.process_time()
    for _ in range(REPEATS):
        down(torch.nn.functional.silu(up(x))).sum().backward()
    return (time.process_time() - started) / REPEATS


def main() -> None:
    """Both times, their ratio, both errors, and what a run would choose."""
    torch.set_num_threads(1)
    names: tuple[Products, ...] = ("default", "onednn")
    for name in names:
        mlp_time(name)
    pairs = [tuple(mlp_time(name) for name in names) for _ in range(ROUNDS)]
    errors = {}
    for name in names:
        errors[name] = product_error() if set_products(name) == name else float("nan")
    default, onednn = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"default {1000 * default:.1f} ms, error {errors['default']:.1e}; ", end="")
    print(f"onednn {1000 * onednn:.1f} ms, error {errors['onednn']:.1e}")
    print(f"default / onednn: {statistics.median(a / b for a, b in pairs):.2f}; a run takes {choose_products()}")


if __name__ == "__main__":
    main()
