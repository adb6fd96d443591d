"""Fixtures and settings of every test."""

from __future__ import annotations

import os

# set here too, so that pytest called by hand behaves as under `make test`; read when torch and transformers load
for _name, _value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "USE_HUB_KERNELS": "NO"}.items():
    os.environ.setdefault(_name, _value)

import torch  # noqa: E402  (reads the variables above)

if not torch.cuda.is_available():
    # read when triton is imported, which whatever test module comes first may do
    os.environ.setdefault("TRITON_INTERPRET", "1")
