"""What the compiler makes of every kernel, without a device: `python -m benchmarks.compile [--check]`.

    --arch sm_80,sm_90,gfx942   --dtype bf16,fp16,fp32   --op ssd,conv,norm,mixing,relation,distill

Compiles each kernel in each configuration that its launcher can choose, with the arguments as the JIT would specialise
them, and prints registers, bytes of spills, shared memory, how many blocks a multiprocessor holds, and the issue slots
of the largest innermost loop: its instructions x warps / 4 schedulers, for one pass. `--check` exits with 1 where a
kernel spills, needs more shared memory than there is, fits less than twice and is not exempt, or takes more issue slots
than `SLOTS` allows; there only those are counted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssmorph.errors import fail, nearest
from ssmorph.kernels.common.shipped import Shipped

OPS = ("ssd", "conv", "norm", "mixing", "relation", "distill")
DTYPES = ("bf16", "fp16", "fp32")


@dataclass(frozen=True)
class Card:
    """Triton's target; registers, warps, blocks and shared bytes of a multiprocessor; shared bytes of a block."""

    target: tuple[str, int | str, int]
    registers: int
    warps: int
    blocks: int
    shared: int
    shared_block: int


# https://docs.nvidia.com/cuda/cuda-c-programming-guide/#compute-capabilities; a MI300's compute unit, waves of 64
CARDS = {
    "sm_80": Card(("cuda", 80, 32), 65536, 64, 32, 167936, 166912),
    "sm_90": Card(("cuda", 90, 32), 65536, 64, 32, 233472, 232448),
    "gfx942": Card(("hip", "gfx942", 64), 131072, 32, 16, 65536, 65536),
}
# sm_86 and sm_89 run what sm_80 runs, with less shared memory
CONSUMER = 101376
# most issue slots of an inner loop, for sm_90 in half types: what docs/gpu.md promises of tiles of 64 x 64
SLOTS = {f"mixing.{side} {loss} N=64 K=64": 400 for side in ("rows", "columns") for loss in ("cosine", "frobenius")}
# the driver keeps some for itself in each block, and hands out multiples of 128
RESERVED, UNIT = 1024, 128


@dataclass(frozen=True)
class Report:
    """Of one compiled kernel: registers of a thread, bytes of its stack, shared bytes, blocks that fit, issue slots."""

    name: str
    registers: int
    spills: int
    shared: int
    warps: int
    blocks: int
    slots: int | None
    exempt: str

    def problems(self, card: Card, slots: int | None = None) -> list[str]:
        """What `--check` finds wrong; `slots` are the most that its loop may take."""
        found = []
        if self.spills:
            found.append(f"{self.spills} bytes of spills")
        if self.shared > card.shared_block:
            found.append(f"{self.shared} bytes of shared memory, {card.shared_block} at most")
        elif self.blocks < 2 and not self.exempt:
            found.append(f"{self.blocks} block per multiprocessor, 2 at least")
        if slots is not None and (self.slots is None or self.slots > slots):
            found.append(f"{self.slots} issue slots, {slots} at most")
        return found


def compile_kernel(kernel: Shipped, arch: str, loops: bool = True) -> Report:
    """Compiles for a target that need not be here; `loops` counts issue slots, half of the time that it all takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names, card = kernel.kernel.arg_names, CARDS[arch]
    source = ASTSource(
        fn=kernel.kernel,
        signature={name: "constexpr" if name in kernel.constants else kernel.arguments[name] for name in names},
        constexprs={(names.index(name),): value for name, value in kernel.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in kernel.aligned},
    )
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
    compiled = triton.compile(source, target=GPUTarget(*card.target), options=options)
    read = _read_amd if card.target[0] == "hip" else _read_nvidia
    registers, spills, slots = read(compiled.asm, kernel.num_warps, loops)
    shared = compiled.metadata.shared
    blocks = blocks_that_fit(card, registers, shared, kernel.num_warps)
    return Report(kernel.name, registers, spills, shared, kernel.num_warps, blocks, slots, kernel.exempt)


def blocks_that_fit(card: Card, registers: int, shared: int, warps: int) -> int:
    """Blocks that a multiprocessor holds at once; registers are handed out to warps by eights, in four quarters."""
    lanes = card.target[2]
    warps_with_registers = card.registers // 4 // (max(8, -(-registers // 8) * 8) * lanes) * 4
    reserved = RESERVED if card.target[0] == "cuda" else 0
    taken = -(-(shared + reserved) // UNIT) * UNIT
    by_shared = card.blocks if taken == 0 else card.shared // taken
    return min(card.blocks, card.warps // warps, warps_with_registers // warps, by_shared)


def _read_nvidia(asm: dict[str, Any], warps: int, loops: bool) -> tuple[int, int, int | None]:
    """Registers, bytes of stack and local memory, and issue slots, from the binary."""
    tools = Path(importlib.import_module("triton").__file__ or "").parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _run(tools / "cuobjdump", "--dump-resource-usage", file.name)
        loop = longest_loop(_run(tools / "nvdisasm", "-c", file.name)) if loops else None
    fields = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return fields["REG"], fields["STACK"] + fields["LOCAL"], None if loop is None else -(-loop * warps // 4)


def _run(*command: object) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def longest_loop(sass: str) -> int | None:
    """Instructions of the longest loop that holds no other; None where there is no loop.

    A loop is what lies between a label and a branch back to it. The endless one behind the exit is none.
    """
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    count = 0
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = count
        elif re.match(r"\s*/\*[0-9a-f]+\*/", line):
            count += 1
            back = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)
            if back and back[1] in labels and count - labels[back[1]] > 1:
                loops.append((labels[back[1]], count))
    inner = [(a, b) for a, b in loops if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)]
    return max((b - a for a, b in inner), default=None)


def _read_amd(asm: dict[str, Any], warps: int, loops: bool) -> tuple[int, int, int | None]:
    """Vector registers with the accumulators, bytes of scratch; loops are not counted."""
    text = asm["amdgcn"]
    found = {name: re.search(rf"; {name}: (\d+)", text) for name in ("TotalNumVgprs", "NumVgprs", "ScratchSize")}
    values = {name: int(match[1]) for name, match in found.items() if match}
    return values.get("TotalNumVgprs", values["NumVgprs"]), values["ScratchSize"], None


def kernels_of(ops: Iterable[str], arch: str, dtype: str) -> list[Shipped]:
    """What the operations ship there, each configuration once."""
    found: dict[str, Shipped] = {}
    for op in ops:
        for kernel in importlib.import_module(f"ssmorph.kernels.{op}.triton").shipped(arch, dtype):
            found.setdefault(f"{kernel}", kernel)
    return list(found.values())


HEAD = ("kernel", "registers", "spills", "shared", "warps", "blocks", "slots", "fits consumer cards")


def table(reports: list[Report]) -> str:
    """Rows below a head, in columns."""
    rows: list[tuple[str, ...]] = [HEAD]
    for r in reports:
        numbers = (r.registers, r.spills, r.shared, r.warps, r.blocks, "" if r.slots is None else r.slots)
        rows.append((r.name, *map(str, numbers), "yes" if r.shared <= CONSUMER else "no"))
    return columns(rows)


def columns(rows: Sequence[tuple[str, ...]]) -> str:
    """Cells below each other, the first column to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


# H100 SXM: dense bfloat16 FLOP/s, bytes/s
PEAK, BANDWIDTH = 989e12, 3.35e12


def roofline() -> str:
    """FLOPs, least bytes and the time they allow, derived on paper: bfloat16, 8 x 2048 tokens, 32 heads, P = N = 64.

    Per token and head a walk multiplies 2 Q (P + N) + 4 P N, of which there is one forwards and three backwards. Least:
    every input read once, every output written once. The mixing loss has 1, 3 and 3 products of 2 x 64 per pair.
    """
    length, heads, width, chunk = 2048, 8 * 32, 64, 64
    tokens = heads * length
    walk = 2 * chunk * 2 * width + 4 * width * width
    pairs = heads * length * (length + 64) / 2
    problems = {
        "ssd forward: x, B, C -> y": (tokens * walk, tokens * (4 * 2 * width + 8)),
        "ssd backward: x, B, C, dy -> dx, dB, dC": (3 * tokens * walk, tokens * (7 * 2 * width + 16)),
        "mixing: q, k, B, C -> dB, dC": (7 * 2 * width * pairs, tokens * (4 * 2 * width + 2 * 4 * width + 12)),
    }
    lines = ["on an H100 SXM, derived, not measured: 8 x 2048 tokens, 32 heads, P = N = 64, bf16"]
    for name, (flops, least) in problems.items():
        compute, memory = 1e6 * flops / PEAK, 1e6 * least / BANDWIDTH
        lines.append(
            f"{name}: {flops / 1e9:.1f} GFLOP, {least / 1e6:.0f} MB; {compute:.0f} us of products, "
            f"{memory:.0f} us of memory: not below {max(compute, memory):.0f} us"
        )
    return "\n".join(lines)


def _list(text: str, option: str, known: Iterable[str]) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in known:
            raise fail(f"--{option}", "must name what is known", repr(name), nearest(name, known))
    return names


def main(arguments: list[str] | None = None) -> int:
    """Prints a table for each architecture and dtype; with --check, 1 where something is wrong."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise fail("TRITON_INTERPRET", "nothing compiles in a process that interprets", 1, "Unset it.")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile", description=__doc__.partition("\n")[0])
    known = {"arch": tuple(CARDS), "dtype": DTYPES, "op": OPS}
    for option, names in known.items():
        parser.add_argument(f"--{option}", default=",".join(names))
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args(arguments)
    archs, dtypes, ops = (_list(getattr(given, option), option, names) for option, names in known.items())
    wrong = []
    for arch in archs:
        for dtype in dtypes:
            most = SLOTS if arch == "sm_90" and dtype != "fp32" else {}
            kernels = kernels_of(ops, arch, dtype)
            reports = [compile_kernel(kernel, arch, loops=not given.check or kernel.name in most) for kernel in kernels]
            print(f"\n{arch} {dtype}\n{table(reports)}", flush=True)
            found = [(r.name, what) for r in reports for what in r.problems(CARDS[arch], most.get(r.name))]
            wrong += [f"{arch} {dtype} {name}: {what}" for name, what in found]
    print(f"\n{roofline()}")
    if not given.check and "sm_90" in archs and "bf16" in dtypes and "ssd" in ops:
        from .compile_peer import report

        print(f"\n{report()}")
    print("\n" + "\n".join(wrong or ["no spills, shared memory within its limit, at least two blocks where wanted"]))
    return int(given.check and bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
