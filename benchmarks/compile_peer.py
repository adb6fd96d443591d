"""mamba-ssm's SSD kernels as benchmarks/compile.py sees ours: every configuration that it would try, for sm_90 in bf16.

Its own launch code runs on tensors without data; what it would start is written down, with the integers as they are.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from ssmorph.kernels.common.launch import TYPES
from ssmorph.kernels.common.shipped import Shipped

from .compile import CARDS, columns, compile_kernel

# a layer of 32 heads, 8 x 2048 tokens, a group for each head; chunks of 256 are the default of its models
BATCH, LENGTH, HEADS, WIDTH, CHUNK = 8, 2048, 32, 64, 256
Launch = tuple[Any, dict[str, Any], list[Any]]


def report() -> str:
    """A table of its kernels, or one line where the package is missing."""
    if importlib.util.find_spec("mamba_ssm") is None:
        return "mamba-ssm not installed: left out"
    forward, backward = _launches()
    once = {fn.__name__: (fn, named, configs) for fn, named, configs in forward + backward}
    rows = [("kernel", "configurations", "spill", "too much shared", "registers", "shared", "blocks")]
    for name, launch in once.items():
        reports = [compile_kernel(kernel, "sm_90", loops=False) for kernel in _configurations(*launch)]
        spilling = sum(r.spills > 0 for r in reports)
        too_much = sum(r.shared > CARDS["sm_90"].shared_block for r in reports)
        ranges = (_range([r.registers for r in reports]), _range([r.shared for r in reports]))
        blocks = _range([r.blocks for r in reports])
        rows.append((name.strip("_"), str(len(reports)), str(spilling), str(too_much), *ranges, blocks))
    launches = f"{len(forward)} launches forwards, {len(backward)} backwards"
    return f"mamba-ssm, sm_90 bf16: {launches}; ranges over its configurations\n{columns(rows)}"


def _range(values: list[int]) -> str:
    return f"{min(values)}-{max(values)}" if min(values) < max(values) else str(values[0])


def _launches() -> tuple[list[Launch], list[Launch]]:
    """What one forward and one backward pass start: function, named arguments, configurations."""
    module = _imported()
    x, B, C, dy = (
        torch.empty(BATCH, LENGTH, HEADS, WIDTH, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for _ in range(4)
    )
    dt = torch.empty(BATCH, LENGTH, HEADS, dtype=torch.bfloat16, device="meta", requires_grad=True)
    A, D, bias = (torch.empty(HEADS, device="meta", requires_grad=True) for _ in range(3))
    with _recording() as launches:
        y = module.mamba_chunk_scan_combined(x, dt, A, B, C, CHUNK, D=D, dt_bias=bias, dt_softplus=True)
        forward = list(launches)
        y.backward(dy.detach())
    return forward, launches[len(forward) :]


def _imported() -> Any:
    """The module of the scan. The package's own start needs a CUDA extension that the scan does not."""
    spec = importlib.util.find_spec("mamba_ssm")
    assert spec is not None
    package = types.ModuleType("mamba_ssm")
    package.__path__ = list(spec.submodule_search_locations or [])
    sys.modules.setdefault("mamba_ssm", package)
    return importlib.import_module("mamba_ssm.ops.triton.ssd_combined")


@contextlib.contextmanager
def _recording() -> Iterator[list[Launch]]:
    """Kernels started inside are written to the list that it yields, and do not run."""
    from triton.runtime.autotuner import Autotuner, Config
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def tuned(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        launches.append((self.fn, dict(zip(self.arg_names, args, strict=False)) | named, self.configs))
        self.best_config = self.configs[0]  # asked for after the launch

    def plain(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        config = Config({}, num_warps=named.pop("num_warps", 4), num_stages=named.pop("num_stages", 3))
        launches.append((self, dict(zip(self.arg_names, args, strict=False)) | named, [config]))

    card = types.SimpleNamespace(multi_processor_count=132)
    device: dict[str, Any] = {"device": lambda _: contextlib.nullcontext(), "get_device_properties": lambda _: card}
    run_tuned, run_plain = patch.object(Autotuner, "run", tuned), patch.object(JITFunction, "run", plain)
    with run_tuned, run_plain, patch.multiple(torch.cuda, **device):
        yield launches


def _configurations(fn: Any, named: dict[str, Any], configs: list[Any]) -> Iterator[Shipped]:
    for config in configs:
        given = named | config.kwargs
        constant = {p.name for p in fn.params if p.is_constexpr}
        fixed = {k: v for k, v in given.items() if k in constant or v is None or (isinstance(v, int) and v == 1)}
        rest = {k: v for k, v in given.items() if k not in fixed}
        yield Shipped(
            name=fn.__name__,
            kernel=fn,
            arguments={k: _type(v) for k, v in rest.items()},
            constants=fixed,
            aligned=tuple(k for k, v in rest.items() if isinstance(v, Tensor) or (isinstance(v, int) and v % 16 == 0)),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


def _type(value: Any) -> str:
    return TYPES[value.dtype] if isinstance(value, Tensor) else "fp32" if isinstance(value, float) else "i32"
