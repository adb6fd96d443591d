"""A run's report as one HTML file: no script, no network, drawn from what the evaluator wrote down."""

from .page import render, write_report
from .run_files import RunFiles, read_run

__all__ = ["RunFiles", "read_run", "render", "write_report"]
