"""C code beside a kernel, compiled for this CPU at first use and kept in the cache folder.

The sources need no headers of torch or Python, so that a compiler is all it takes, about two seconds once. They are
compiled once for float and once for double (-DDOUBLE), and get a struct of sizes and addresses. Where there is no
compiler, `refuses_native` says so and the dispatch takes another backend.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from ssmorph.errors import fail

KERNELS = Path(__file__).resolve().parent.parent
COMMON = ("common/tiles.h",)
# no -ffast-math: linked into a library it makes the whole process flush denormals
FLAGS = (
    "-O3", "-std=gnu11", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros",
    "-fassociative-math", "-freciprocal-math",
)  # fmt: skip
# the first that the compiler takes: x86, then ARM, then no tuning at all
TUNING = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",), ())


def refuses_native(device: torch.device) -> str | None:
    """Why compiled C code cannot run on the device, or None where it can. Compiles what is not compiled yet."""
    if device.type != "cpu":
        return "native code runs on the CPU"
    return "torch.compile cannot trace C" if torch.compiler.is_compiling() else _broken()


@functools.cache
def _broken() -> str | None:
    try:
        for source in sorted(KERNELS.glob("*/native.c")):
            loaded(str(source.relative_to(KERNELS)), torch.float32)
    except (OSError, ValueError) as error:
        return str(error)
    return None


@functools.cache
def loaded(source: str, dtype: torch.dtype) -> ctypes.CDLL:
    """The compiled file, such as 'ssd/native.c'; made at the first call on this machine.

    Raises:
        ValueError: no C compiler, or one that fails.
        OSError: the cache folder cannot be written.
    """
    compiler, tuning, machine = _compiler()
    flags = [*FLAGS, *tuning, *(["-DDOUBLE"] if dtype == torch.float64 else [])]
    files = [KERNELS / name for name in (*COMMON, source)]
    text = "\0".join([machine, *flags, *(file.read_text() for file in files)])
    name = f"{source.partition('/')[0]}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    target = _folder() / name
    if not target.exists():
        _compile([compiler, *flags, f"-I{KERNELS / 'common'}", str(files[-1])], target)
    return ctypes.CDLL(str(target))


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("SSMORPH_CACHE") or Path(base) / "ssmorph") / "native"


def _compile(command: list[str], target: Path) -> None:
    """Into a file of another name first, so that no other process ever loads half a library."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        done = subprocess.run([*command, "-o", str(made), "-lm"], capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise fail("kernels.native", f"{command[0]} must compile {Path(command[-1]).name}", lines[0], "See CC.")
        made.replace(target)


@functools.cache
def _compiler() -> tuple[str, tuple[str, ...], str]:
    """Its path, the tuning flags that it takes, and what it says of itself and of this CPU."""
    names = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        do = "Install gcc or clang, or set CC."
        raise fail("kernels.native", "a C compiler must be on the PATH", " and ".join(names) + " are not", do)
    for tuning in TUNING:
        # its predefined macros name the version, and every instruction set it would use
        command = [found, *tuning, "-dM", "-E", "-x", "c", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return found, tuning, done.stdout
    raise fail("kernels.native", f"{found} must be a C compiler", done.stderr.strip()[:200], "Set CC to another.")


class View(ctypes.Structure):
    """A tensor [batch, token, head] or [batch, token, head, n] by its address and strides, in elements."""

    _fields_ = [("at", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "token", "head"))]


def fill(problem: ctypes.Structure, tensors: Mapping[str, Tensor | None]) -> None:
    """Writes tensors into fields of a struct, as views or addresses. The caller keeps them alive while C runs."""
    views = {name for name, kind, *_ in problem._fields_ if kind is View}
    for name, t in tensors.items():
        if name in views:
            setattr(problem, name, View() if t is None else View(t.data_ptr(), *t.stride()[:3]))
        else:
            setattr(problem, name, None if t is None else t.data_ptr())


def call(source: str, function: str, problem: ctypes.Structure, dtype: torch.dtype, units: int) -> None:
    """Runs a function of native.c over all units of work; each unit must stand alone.

    Raises:
        MemoryError: there is none for scratch space.
    """
    run = getattr(loaded(source, dtype), function)
    _in_parts(lambda first, stop: run(ctypes.byref(problem), ctypes.c_int64(first), ctypes.c_int64(stop)), units)


def inner_contiguous(t: Tensor) -> Tensor:
    """As it is where the last dimension lies in a row, which is all that the C code asks for."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _in_parts(function: Callable[[int, int], int], units: int) -> None:
    """Calls function(first, stop) over parts of `units`, as many as torch has threads."""
    threads = max(1, min(torch.get_num_threads(), units))
    if threads == 1:
        statuses = [function(0, units)]
    else:
        borders = [units * i // threads for i in range(threads + 1)]
        # ctypes lets go of the interpreter's lock while C runs
        statuses = list(_pool(os.getpid(), threads).map(function, borders[:-1], borders[1:]))
    if any(statuses):
        raise MemoryError("kernels.native: no memory for scratch space")


@functools.lru_cache(maxsize=2)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Of this process: threads do not survive a fork."""
    return ThreadPoolExecutor(threads, thread_name_prefix="ssmorph")
