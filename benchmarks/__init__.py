"""One script per claim of the README: `python -m benchmarks.NAME` prints a ratio against a named peer."""
