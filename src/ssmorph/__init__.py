"""ssmorph turns a pretrained transformer into a Mamba-2 hybrid, in stages you can stop and resume.

The verbs of the command line are functions here, imported on first use, so that `import ssmorph` stays instant:

    convert(recipe, *overrides, run_dir=None)     run or resume a recipe
    plan(target)                                  what a conversion would do and cost
    status(run_dir)                               how far a run is
    evaluate_run(run_dir, suite="full")           measure a finished run again
    report(run_dir)                               the measurements as one HTML file
    generate(folder, prompt)                      text from a converted hybrid
    export(run_dir)                               the hybrid as an architecture that other software has
    doctor()                                      what works on this machine
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

__all__ = ["__version__", "convert", "doctor", "evaluate_run", "export", "generate", "pack", "plan", "report", "status"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import verbs

        return getattr(verbs, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
