"""Measures a finished run again with another suite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ssmorph.convert.families import family_of
from ssmorph.convert.teachers import load_teacher

from ..errors import fail
from .artifact import earlier_students, load_student
from .config import as_dict
from .data import open_or_pack
from .evaluate import evaluate
from .health import inspect_final
from .recipe import load_saved
from .rundir import RunDir
from .suite import suite_named


def reevaluate(folder: Path, suite: str, tokens: int | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Evaluates the run's last artifact; writes report-SUITE.json beside report.json."""
    if not (folder / "final").is_dir():
        raise fail("eval", "must be a finished run", str(folder), "Run convert to its end first.")
    with RunDir(folder) as run:
        config = load_saved(folder)
        torch.set_num_threads(run.read_json("env.json")["threads"])
        t = config.teacher
        teacher, tokenizer = load_teacher(t.source, t.revision, t.trust_remote_code, config.device)
        student = load_student(folder / config.stage_names()[-1] / "student", teacher, own_rest=False)
        data = open_or_pack(config.data, tokenizer, folder / "data", say)
        measured = evaluate(teacher, student, family_of(teacher.config), data, tokenizer,
                            suite_named(suite, tokens or config.evaluate.tokens, config.data.window),
                            controls=config.evaluate.controls, seed=config.seed, say=say,
                            earlier=earlier_students(folder, config, teacher))  # fmt: skip
        done = run.done(config.stage_names()[-1])
        assert done is not None
        wanted = {**as_dict(config.evaluate), "suite": suite, "tokens": tokens or config.evaluate.tokens}
        measured["stamp"] = {"artifact": done["artifact"], "evaluate": wanted}
        measured["final"] = inspect_final(folder / "final", tokenizer)
        run.write_json(f"report-{suite}.json", measured)
    return measured
