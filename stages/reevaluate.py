"""Opens a finished run with its models and data, and measures it again with another suite."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ssmorph.convert.families import family_of
from ssmorph.convert.teachers import load_teacher

from ..errors import fail
from .artifact import earlier_students, load_student
from .config import RunConfig, as_dict
from .context import Context, StopFlag
from .data import PackedData, open_or_pack
from .evaluate import evaluate
from .health import inspect_final
from .identity import check_teacher
from .machine import as_before, set_products
from .pipeline import further_controls
from .recipe import load_saved
from .rundir import RunDir
from .suite import suite_named
from .tracking import NoTracker


class Finished(NamedTuple):
    """A finished run, held: its folder, recipe, teacher, last student, packed data and tokenizer."""

    run: RunDir
    config: RunConfig
    teacher: Any
    student: Any
    data: PackedData
    tokenizer: Any


def check_finished(folder: Path) -> None:
    """Raises ValueError where a folder is no finished run."""
    if not (folder / "final").is_dir():
        raise fail("eval", "must be a finished run", str(folder), "Run convert to its end first.")


@contextlib.contextmanager
def opened(folder: Path, say: Callable[[str], None]) -> Iterator[Finished]:
    """Holds a finished run and loads what it was made from; computes as its run did."""
    check_finished(folder)
    with RunDir(folder) as run, as_before():
        config = load_saved(folder)
        environment = run.read_json("env.json")
        if environment is None:
            raise fail(f"{folder}/env.json", "must tell how the run computed", "no such file", "Run convert again.")
        torch.set_num_threads(environment["threads"])
        if config.device == "cpu":
            set_products(environment.get("products", "default"))
        t = config.teacher
        teacher, tokenizer = load_teacher(t.source, t.revision, t.trust_remote_code, config.device)
        check_teacher(run, t, teacher.config)
        student = load_student(folder / config.stage_names()[-1] / "student", teacher, own_rest=False)
        data = open_or_pack(config.data, tokenizer, folder / "data", say)
        yield Finished(run, config, teacher, student, data, tokenizer)


def reevaluate(folder: Path, suite: str, tokens: int | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Evaluates the run's last artifact; writes report-SUITE.json beside report.json."""
    with opened(folder, say) as (run, config, teacher, student, data, tokenizer):
        ctx = Context(config=config, run=run, teacher=teacher, student=student, spec=family_of(teacher.config),
                      data=data, stop=StopFlag(), say=say, tracker=NoTracker(), tokenizer=tokenizer)  # fmt: skip
        measured = evaluate(teacher, student, ctx.spec, data, tokenizer,
                            suite_named(suite, tokens or config.evaluate.tokens, config.data.window),
                            controls=config.evaluate.controls, seed=config.seed, say=say,
                            earlier=earlier_students(folder, config, teacher),
                            further=further_controls(ctx))  # fmt: skip
        done = run.done(config.stage_names()[-1])
        assert done is not None
        wanted = {**as_dict(config.evaluate), "suite": suite, "tokens": tokens or config.evaluate.tokens}
        measured["stamp"] = {"artifact": done["artifact"], "evaluate": wanted}
        measured["final"] = inspect_final(folder / "final", tokenizer)
        run.write_json(f"report-{suite}.json", measured)
    return measured
