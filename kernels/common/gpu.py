"""Where Triton kernels can run: on a GPU, or anywhere under Triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

import importlib.util
import os

import torch

# set by launch.recorded alone
forced_architecture: str | None = None


def refuses_triton(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on the device, or None where they can. Does not import triton."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return "triton needs a GPU, or TRITON_INTERPRET=1 (slow, for tests)"
    return None


def architecture(device: torch.device) -> str:
    """The key of a kernel's configuration table: 'sm_80' (also newer consumer cards), 'sm_90' (and later), 'gfx942'.

    Under the interpreter 'sm_90', so that the shipped configuration is what tests run.
    """
    if forced_architecture is not None:
        return forced_architecture
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip:
        return "gfx942"
    return "sm_90" if torch.cuda.get_device_capability(device)[0] >= 9 else "sm_80"


def precision(device: torch.device, *operands: torch.Tensor) -> str:
    """How tl.dot multiplies: half types as they are.

    Of float32 one product of TF32 keeps 10 bits, three keep all; AMD's cards multiply float32 itself.
    """
    if max(t.element_size() for t in operands) < 4:
        return "tf32"
    return "ieee" if architecture(device).startswith("gfx") else "tf32x3"
