"""`python -m ssmorph` and the console command."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Runs the command line; exits with 2 for a user's mistake and 128 + signal for a stopped run."""
    # spinning OpenMP threads starve each other on shared cores: up to ten times slower than one thread
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from .cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
