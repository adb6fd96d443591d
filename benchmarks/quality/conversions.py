"""What the scripts of this folder share: a conversion from a recipe, and results that are kept as they come."""

from __future__ import annotations

import datetime
import json
import platform
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs/quality")
TEACHER = "smollm2-135m"


class Converted(NamedTuple):
    """What a conversion leaves: both models, the tokenizer, the packed data, and the CPU time it took."""

    teacher: Any
    student: Any
    tokenizer: Any
    data: Any
    cpu_minutes: float


def converted(name: str, recipe: Path, changes: Sequence[str]) -> Converted:
    """Runs `recipe` with `changes`, or goes on with the run of this name."""
    from ssmorph.verbs import convert

    folder = RUNS / name
    started = time.process_time()
    convert(recipe, *changes, "evaluate.suite=none", run_dir=str(folder), say=lambda text: None)
    return opened(folder, (time.process_time() - started) / 60)


def opened(folder: Path, minutes: float = 0.0) -> Converted:
    """A finished run."""
    from ssmorph.convert.teachers import load_teacher
    from ssmorph.stages.artifact import load_student
    from ssmorph.stages.data import PackedData

    teacher, tokenizer = load_teacher(TEACHER)
    last = max((f for f in folder.iterdir() if f.name[0].isdigit()), key=lambda f: int(f.name.split("-")[0]))
    student = load_student(last / "student", teacher, own_rest=False)
    return Converted(teacher, student, tokenizer, PackedData(folder / "data"), minutes)


def scored(done: Converted, length: int = 512, tokens: int = 8192) -> dict[str, Any]:
    """The student beside its teacher on held-out documents in windows of `length`."""
    from ssmorph.stages.evaluate import heldout_sets
    from ssmorph.stages.scores import Candidate, score
    from ssmorph.stages.suite import suite_named

    _, windows_WL = heldout_sets(done.data, length, suite_named("short", tokens, length))[0]
    scores = score(done.teacher, [Candidate("hybrid", done.student)], windows_WL)
    base, row = scores["teacher"].summary(), scores["hybrid"].summary()
    return {
        "ratio": row["perplexity"] / base["perplexity"], "kl": row["kl"], "top1": row["top1"],
        "teacher_perplexity": base["perplexity"], "held_out_tokens": row["tokens"],
        "cpu_minutes": round(done.cpu_minutes, 1),
    }  # fmt: skip


def kept(name: str) -> dict[str, Any] | None:
    """A result that is there already."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.is_file() else None


def keep(name: str, result: dict[str, Any]) -> None:
    """Writes a result, whole or not at all, and drops the run that it came from."""
    stamp = {"date": datetime.date.today().isoformat(), "machine": processor()}
    RESULTS.mkdir(exist_ok=True)
    partial = RESULTS / f"{name}.partial"
    partial.write_text(json.dumps({**result, **stamp}, indent=1) + "\n")
    partial.replace(RESULTS / f"{name}.json")
    shutil.rmtree(RUNS / name, ignore_errors=True)


def processor() -> str:
    """The processor's name as its maker writes it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
