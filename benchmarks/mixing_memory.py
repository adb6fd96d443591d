"""Peak memory of one mixing step against the window length: `python -m benchmarks.mixing_memory`.

One converted layer of SmolLM2-135M's sizes. Each length runs in a fresh process; the peer is the same loss with both
L x L matrices written out (this package's own reference).
"""

from __future__ import annotations

import resource
import subprocess
import sys

import torch

LENGTHS = (1024, 2048, 4096)
HEADS, WIDTH = 9, 64


def child(backend: str, length: int) -> None:
    """Prints the MiB that loss and gradients add to the process."""
    from ssmorph.kernels.mixing import mixing_loss

    torch.set_num_threads(1)
    torch.manual_seed(0)

    def step(n: int) -> None:
        C, B, q = (torch.randn(1, n, HEADS, WIDTH) / 8 for _ in range(3))
        k = torch.randn(1, n, 3, WIDTH)
        log_a = -0.05 * torch.rand(1, n, HEADS)
        leaves = [t.requires_grad_() for t in (C, B, log_a)]
        mixing_loss(*leaves, q, k, scale=WIDTH**-0.5, loss="cosine", backend=backend).backward()

    step(64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(length)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def main() -> None:
    """Prints MiB for each length, MiB per 1024 tokens, and the ratio to the reference."""
    for length in LENGTHS:
        used = {}
        for backend in ("chunked", "reference"):
            command = [sys.executable, "-m", "benchmarks.mixing_memory", backend, str(length)]
            used[backend] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        own = used["chunked"]
        per = own / length * 1024
        ratio = used["reference"] / own
        print(f"L {length}: {own:.0f} MiB, {per:.1f} per 1024 tokens; both matrices written out take {ratio:.1f} x that")


if __name__ == "__main__":
    child(sys.argv[1], int(sys.argv[2])) if len(sys.argv) > 1 else main()
