"""Ahead-of-time compilation: the shipped kernels fit their cards, and the checker notices when one does not.

A process either interprets kernels or compiles them, so what compiles runs in one of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from benchmarks.compile import CARDS, SLOTS, Report, blocks_that_fit, longest_loop, main, table

ROOT = Path(__file__).parents[2]
BAD_KERNELS = """
import triton
import triton.language as tl

from benchmarks.compile import CARDS, compile_kernel
from ssmorph.kernels.common.shipped import Shipped


@triton.jit
def spills(x_ptr, SIZE: tl.constexpr):
    at = x_ptr + tl.arange(0, SIZE)
    x = tl.load(at)
    tl.store(at, x / tl.sum(x, 0))


@triton.jit
def shares(a_ptr, out_ptr, times, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    sums = tl.zeros((SIZE, SIZE), tl.float32)
    for i in range(0, times):
        a = tl.load(a_ptr + 2 * i * SIZE * SIZE + at)
        sums += tl.dot(a, tl.load(a_ptr + (2 * i + 1) * SIZE * SIZE + at))
    tl.store(out_ptr + at, sums)


def shipped(kernel, arguments, size, warps, stages):
    aligned = tuple(name for name in arguments if name != "times")
    return Shipped(name=kernel.__name__, kernel=kernel, arguments=arguments, constants={"SIZE": size}, aligned=aligned,
                   num_warps=warps, num_stages=stages, exempt="for the test")


two = {"a_ptr": "*bf16", "out_ptr": "*fp32", "times": "i32"}
for kernel in (
    shipped(spills, {"x_ptr": "*fp32"}, 16384, 1, 1),
    shipped(spills, {"x_ptr": "*fp32"}, 256, 1, 1),
    shipped(shares, two, 128, 8, 6),
    shipped(shares, two, 64, 4, 2),
):
    report = compile_kernel(kernel, "sm_90")
    print(kernel.name, report.problems(CARDS["sm_90"]), "loop" if report.slots else "no loop")
"""


def run(cache: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": path}
    return subprocess.run([sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_shipped_kernels_fit(tmp_path: Path, needs_triton: None) -> None:
    # how many registers a kernel takes moves with the compiler, so another version need only compile everything
    check = ("--check",) * (f"triton=={version('triton')}" in (ROOT / "requirements/triton.txt").read_text())
    done = run(tmp_path, "-m", "benchmarks.compile", "--arch", "sm_80,sm_90", "--dtype", "bf16", *check)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    for kernel in ("ssd.walk y", "ssd.step", "conv.backward", "norm.backward", "mixing.", "relation.", "distill."):
        assert done.stdout.count(kernel) >= 2, kernel
    *_, rows = done.stdout.partition("sm_90 bf16")
    for kernel in SLOTS:
        # counted, and so held to its limit: the last number but for 'yes' or 'no'
        (row,) = (line.removeprefix(kernel).split() for line in rows.splitlines() if line.startswith(kernel))
        assert len(row) == 7, row


@pytest.mark.slow
def test_the_checker_notices(tmp_path: Path, needs_triton: None) -> None:
    script = tmp_path / "bad_kernels.py"
    script.write_text(BAD_KERNELS)
    done = run(tmp_path / "cache", str(script))
    assert done.returncode == 0, done.stderr[-1000:]
    too_big, fits, too_much, enough = done.stdout.splitlines()
    assert "bytes of spills" in too_big
    assert "no loop" in too_big
    assert fits == "spills [] no loop"
    assert "bytes of shared memory, 232448 at most" in too_much
    assert enough == "shares [] loop"


def report(**change: object) -> Report:
    good = {"registers": 64, "spills": 0, "shared": 1024, "warps": 4, "blocks": 8, "slots": None, "exempt": ""}
    return Report(name="op.kernel", **(good | change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"spills": 8}, "8 bytes of spills"),
        ({"shared": 232449}, "232449 bytes of shared memory"),
        ({"blocks": 1}, "1 block per multiprocessor"),
        ({"blocks": 1, "exempt": "wider than 128"}, None),
        ({"spills": 8, "exempt": "wider than 128"}, "8 bytes of spills"),
    ],
)
def test_problems(change: dict[str, object], problem: str | None) -> None:
    found = report(**change).problems(CARDS["sm_90"])
    assert len(found) == (problem is not None)
    assert all(problem in line for line in found if problem)


@pytest.mark.parametrize(("slots", "right"), [(400, True), (401, False), (None, False)])
def test_issue_slots_have_a_limit_where_one_is_given(slots: int | None, right: bool) -> None:
    assert report(slots=slots).problems(CARDS["sm_90"]) == []
    wanted = [] if right else [f"{slots} issue slots, 400 at most"]
    assert report(slots=slots).problems(CARDS["sm_90"], 400) == wanted


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "blocks"),
    [
        ("sm_90", 255, 0, 4, 2),
        ("sm_90", 168, 0, 4, 3),
        ("sm_90", 128, 0, 8, 2),
        ("sm_90", 129, 0, 8, 1),
        ("sm_90", 32, 115712, 4, 2),
        ("sm_90", 32, 115713, 4, 1),
        ("sm_80", 32, 82944, 4, 2),
        ("sm_80", 32, 82945, 4, 1),
        ("sm_90", 16, 0, 1, 32),
    ],
)
def test_blocks_that_fit(arch: str, registers: int, shared: int, warps: int, blocks: int) -> None:
    assert blocks_that_fit(CARDS[arch], registers, shared, warps) == blocks


def test_table_says_what_fits_consumer_cards() -> None:
    lines = table([report(shared=101376, slots=394), report(shared=101377)]).splitlines()
    assert [line.split()[-1] for line in lines[1:]] == ["yes", "no"]
    assert "394" in lines[1]


def test_longest_innermost_loop() -> None:
    def instructions(count: int) -> str:
        return "        /*0010*/                   FADD R1, R1, R2 ;\n" * count

    def back(label: str) -> str:
        return f"        /*0020*/              @P0 BRA `({label}) ;\n"

    nested = f".L_x_0:\n{instructions(5)}.L_x_1:\n{instructions(3)}{back('.L_x_1')}{instructions(2)}{back('.L_x_0')}"
    other = f".L_x_2:\n{instructions(6)}{back('.L_x_2')}"
    ahead = f"{back('.L_x_9')}{instructions(30)}"
    endless = f".L_x_9:\n{back('.L_x_9')}"
    assert longest_loop(nested + ahead + endless) == 4
    assert longest_loop(nested + other + endless) == 7
    assert longest_loop(ahead + endless) is None


def test_refuses_to_interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="TRITON_INTERPRET: nothing compiles in a process that interprets"):
        main([])


def test_unknown_names_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"--arch: .*'sm_91'.*'sm_90'"):
        main(["--arch", "sm_80,sm_91"])
