"""How long `ssmorph --help`, a mistake in a recipe, and a bare interpreter take: `python -m benchmarks.startup`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT = 0.5
REPEATS = 7


def seconds(*command: str) -> float:
    """The fastest of several runs: a busy machine only ever adds time."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], capture_output=True, check=False)
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Prints seconds and the ratio to the interpreter's own start."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder, "wrong.yaml")
        recipe.write_text("teacher: {source: tiny-random-llama}\nrun_dir: x\nstudent: {mixer: mamba3}\n")
        bare = seconds("-c", "pass")
        for name, command in (
            ("ssmorph --help", ("-m", "ssmorph", "--help")),
            ("a mistake in the recipe", ("-m", "ssmorph", "convert", str(recipe))),
        ):
            took = seconds(*command)
            print(f"{name}: {took:.3f} s, {took / bare:.1f} x a bare interpreter, limit {LIMIT} s")


if __name__ == "__main__":
    main()
