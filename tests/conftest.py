"""Fixtures and settings of every test."""

from __future__ import annotations

import os

# set here too, so that pytest called by hand behaves as under `make test`; read when torch and transformers load
for _name, _value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "USE_HUB_KERNELS": "NO"}.items():
    os.environ.setdefault(_name, _value)
