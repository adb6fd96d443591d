"""Runs a recipe: its stages in order over a run directory, then the evaluation. The same call again resumes.

A finished stage is never run again; a stage that was interrupted continues from its newest checkpoint. What a stage
hands on is an artifact whose hash the next one records.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ssmorph.convert.families import family_of
from ssmorph.convert.plan import Head, strategy_of
from ssmorph.convert.surgery import MixerChoice
from ssmorph.convert.teachers import load_config, load_teacher

from .. import __version__
from ..errors import fail
from .artifact import copied_student, earlier_students, load_student, save_student
from .calibrate import drop_fits, run_calibrate
from .card import model_card
from .checkpoint import tensor_errors
from .config import (
    STAGES,
    CalibrateStage,
    HiddenStage,
    LogitsStage,
    MixingStage,
    RunConfig,
    Stage,
    StudentConfig,
    SurgeryStage,
    TrainStage,
    as_dict,
)
from .context import Context, stop_signals
from .data import open_or_pack
from .evaluate import evaluate
from .health import inspect_final
from .hidden import run_hidden
from .identity import check_teacher
from .kept_heads import heads_before_probe, kept_heads
from .logits import run_logits
from .machine import as_before, check_device, choose_products, choose_threads, set_products
from .mixing import run_mixing
from .offline import check_stamps, check_stored
from .placement import control_students, converted_before_scores, described, placed_layers
from .recipe import difference, dump, load_saved
from .rivals import trained_windows
from .rundir import RunDir, atomic_folder, atomic_write, disk_errors, remove_folder
from .suite import suite_named
from .targets import check_targets
from .tracking import make_tracker


def convert(
    config: RunConfig, *, until: str | None = None, start: str | None = None, say: Callable[[str], None] = print
) -> Path:
    """Runs or resumes `config`; returns the run directory.

    Args:
        until: stop after the stage of this kind or folder name, before any evaluation.
        start: run this stage and all after it again, forgetting what they wrote.

    Raises:
        ValueError: a mistake in the recipe, the teacher, the data or the disk; nothing saved is lost.
        Interrupted: SIGTERM or Ctrl-C; the same command resumes.
    """
    names = config.stage_names()
    last = _stage_named(names, until) if until else len(names) - 1
    first = _stage_named(names, start) if start else len(names)
    t = config.teacher
    check_device(config.device)
    teacher_config = load_config(t.source, t.revision, t.trust_remote_code)
    # a mistake in student.layers or student.heads shows before anything is written
    spec = family_of(teacher_config)
    heads_before_probe(config, converted_before_scores(config, spec, teacher_config), spec.shape(teacher_config))
    with RunDir(config.run_dir) as run, stop_signals() as stop, as_before():
        _agree(run, config, first)
        check_teacher(run, t, teacher_config, anew=first == 0)
        if start:
            _forget(run, first)
        atomic_write(run.path / "config.yaml", dump(config))
        _environment(run, config)
        log = _logger(run, say)
        waiting = [i for i in range(last + 1) if not run.finished(names[i])]
        check_targets(config, waiting)
        check_stored(config, waiting)
        ctx = prepare(config, run, stop, log)
        check_stamps(ctx, waiting)
        try:
            run_stages(ctx, _placed(ctx), last)
            if until is None:
                _finish(ctx)
        finally:
            ctx.tracker.finish()
    return Path(config.run_dir)


def _stage_named(names: list[str], wanted: str) -> int:
    found = [i for i, name in enumerate(names) if wanted in (name, name.split("-", 1)[1])]
    if len(found) != 1:
        raise fail(
            "stage", "must name one stage of the recipe", repr(wanted), f"The recipe's stages: {', '.join(names)}."
        )
    return found[0]


def _agree(run: RunDir, config: RunConfig, first: int) -> None:
    """Refuses a recipe that differs from the run's in something that a started stage before `first` depends on."""
    if not (run.path / "config.yaml").exists():
        return
    old = load_saved(run.path)
    frontier = max((i for i, name in enumerate(old.stage_names()[:first]) if run.started(name)), default=-1)
    changed = [change for change in difference(old, config) if not _free(change[0], frontier)]
    if changed and frontier >= 0:
        lines = "; ".join(f"{path}: {before} -> {after}" for path, before, after in changed)
        do = "Use another run_dir, or --from the first changed stage."
        raise fail("run_dir", "the recipe of a started run does not change", lines, do)


def _free(path: str, frontier: int) -> bool:
    """Whether no started stage depends on this part of the recipe; `frontier` is the last one that started."""
    if path.startswith("stages["):
        return int(path[7:].split("]")[0]) > frontier
    return path.split(".")[0] in ("run_dir", "tracker", "evaluate", "threads")


def _forget(run: RunDir, first: int) -> None:
    """Removes what came of the stages from `first` on, last first, so that a kill leaves a run that is only shorter."""
    if (run.path / "final").is_dir():
        remove_folder(run.path / "final")
    for pattern in ("report.json", "report-short.json", "report-full.json", "lm-eval-*.json", "report.html"):
        for file in run.path.glob(pattern):
            file.unlink()
    # nothing but stages: a run may have been started in a folder that holds more
    stages = re.compile(rf"(\d+)-({'|'.join(STAGES)})")
    numbered = {int(m[1]): p for p in run.path.iterdir() if (m := stages.fullmatch(p.name)) and p.is_dir()}
    for number in sorted((n for n in numbered if n >= first), reverse=True):
        remove_folder(numbered[number])
        run.truncate_metrics(numbered[number].name, 0)


def _environment(run: RunDir, config: RunConfig) -> None:
    """Fixes threads and the library of products for the life of the run, since results depend on them bit for bit."""
    saved = run.read_json("env.json") or {}
    threads = saved.get("threads") or config.threads or choose_threads()
    torch.set_num_threads(threads)
    products = saved.get("products", "default") if saved or config.device != "cpu" else choose_products()
    if config.device == "cpu":
        products = set_products(products)
    versions = {name: sys.modules[name].__version__ for name in ("torch", "transformers")}
    versions["ssmorph"] = __version__
    run.write_json("env.json", {"threads": threads, "products": products, "python": platform.python_version(),
                                "machine": platform.machine(), "cpus": os.cpu_count(), **versions})  # fmt: skip


def _logger(run: RunDir, say: Callable[[str], None]) -> Callable[[str], None]:
    def log(text: str) -> None:
        say(text)
        with disk_errors(run.path / "log.txt"), (run.path / "log.txt").open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    return log


def prepare(config: RunConfig, run: RunDir, stop: Any, log: Callable[[str], None]) -> Context:
    """Loads the teacher and opens the data; there is no student yet."""
    t = config.teacher
    teacher, tokenizer = load_teacher(t.source, t.revision, t.trust_remote_code, config.device)
    data = open_or_pack(config.data, tokenizer, run.path / "data", log, stop.check)
    tracker = make_tracker(config.tracker, run.path, as_dict(config))
    teacher.requires_grad_(False)
    return Context(config=config, run=run, teacher=teacher, student=None, spec=family_of(teacher.config),
                  data=data, stop=stop, say=log, tracker=tracker, tokenizer=tokenizer)  # fmt: skip


def _placed(ctx: Context) -> tuple[int, ...]:
    """The layers to convert, which plan.json tells; after surgery, those that were converted."""
    done = ctx.run.done(ctx.config.stage_names()[0])
    layers = placed_layers(ctx, run_stages) if done is None else tuple(done["summary"]["layers"])
    plan: dict[str, Any] = {"layers": list(layers), "mixer": ctx.config.student.mixer}
    heads = kept_heads(ctx, layers) if done is None else done["summary"].get("heads", [])
    plan |= {"heads": [list(head) for head in heads]} if heads else {}
    ctx.run.write_json("plan.json", plan | described(ctx.config, strategy_of(ctx.config.student.layers), ctx.run))
    return layers


def run_stages(ctx: Context, layers: tuple[int, ...], last: int) -> None:
    """Runs or resumes the stages up to the index `last`; `ctx.student` is what the last of them leaves."""
    source = ""
    rest_trained = False
    trains_rest = any(_trains_rest(stage) for stage in ctx.config.stages)
    pending: Path | None = None
    for index, name in enumerate(ctx.config.stage_names()[: last + 1]):
        stage = ctx.config.stages[index]
        rest_trained = rest_trained or _trains_rest(stage)
        folder = ctx.run.stage_dir(name)
        done = ctx.run.done(name)
        if done is not None:
            if done["source"] != source:
                raise fail(
                    str(folder),
                    "must be made from the stage before it",
                    "another artifact",
                    f"Run again with --from {name}.",
                )
            source, pending = done["artifact"], folder / "student"
            drop_fits(folder)
            continue
        if pending is not None and ctx.student is None:
            ctx.student = load_student(pending, ctx.teacher, trains_rest)
        ctx.say(f"{name}: starting")
        ctx.run.write_json(f"{name}/config.json", as_dict(stage))
        summary = _run_stage(ctx, index, stage, layers, trains_rest)
        with atomic_folder(folder / "student") as partial, tensor_errors(folder):
            save_student(partial, ctx.student, rest_trained)
        source = ctx.run.mark_done(name, source, summary)
        drop_fits(folder)
        pending = folder / "student"
        ctx.stop.check()
    if ctx.student is None and pending is not None:
        ctx.student = load_student(pending, ctx.teacher, trains_rest)


def _trains_rest(stage: Stage) -> bool:
    return isinstance(stage, TrainStage) and stage.optim.rest_lr > 0


def mixer_choice(student: StudentConfig, init: str, kept: tuple[Head, ...] = ()) -> MixerChoice:
    """The recipe's student as surgery takes it."""
    return MixerChoice(kind=student.mixer, conv_kernel=student.conv_kernel, init=init, window=student.window,
                       sinks=student.sinks, state=student.state, kept=kept)  # fmt: skip


def _run_stage(ctx: Context, index: int, stage: Stage, layers: tuple[int, ...], own_rest: bool) -> dict[str, Any]:
    if isinstance(stage, SurgeryStage):
        c, kept = ctx.config, kept_heads(ctx, layers)
        choice = mixer_choice(c.student, stage.init, kept)
        ctx.student = copied_student(ctx.teacher, ctx.spec, layers, choice, c.seed, own_rest)
        return {"layers": list(layers), **({"heads": [list(head) for head in kept]} if kept else {})}
    if isinstance(stage, CalibrateStage):
        return {"fits": [dataclasses.asdict(fit) for fit in run_calibrate(ctx, index, stage)]}
    if isinstance(stage, MixingStage):
        return dataclasses.asdict(run_mixing(ctx, index, stage))
    if isinstance(stage, HiddenStage):
        return dataclasses.asdict(run_hidden(ctx, index, stage))
    assert isinstance(stage, LogitsStage)
    return dataclasses.asdict(run_logits(ctx, index, stage))


def further_controls(ctx: Context) -> list[tuple[str, Callable[[], Any]]]:
    """What makes the students to compare with: of a scored placement's control, and trained windows if wanted."""
    wanted, layers = ctx.config.evaluate, tuple(sorted(ctx.student.mixers()))
    placements = control_students(ctx, layers, run_stages) if wanted.controls else []
    return placements + (trained_windows(ctx, run_stages) if wanted.trained_controls else [])


def _finish(ctx: Context) -> None:
    """Evaluates and writes final/, the folder that from_pretrained loads."""
    config, run = ctx.config, ctx.run
    ctx.student.requires_grad_(False)
    report = run.read_json("report.json")
    wanted = as_dict(config.evaluate)
    artifact = run.done(config.stage_names()[-1])
    assert artifact is not None
    stamp = {"artifact": artifact["artifact"], "evaluate": wanted}

    def say(text: str) -> None:
        ctx.say(text)
        ctx.stop.check()

    if config.evaluate.suite != "none" and (report is None or report.get("stamp") != stamp):
        suite = suite_named(config.evaluate.suite, config.evaluate.tokens, config.data.window)
        report = evaluate(ctx.teacher, ctx.student, ctx.spec, ctx.data, ctx.tokenizer, suite,
                          controls=config.evaluate.controls, seed=config.seed, say=say,
                          earlier=earlier_students(run.path, config, ctx.teacher),
                          further=further_controls(ctx))  # fmt: skip
        report = {"stamp": stamp, **report}
        run.write_json("report.json", report)
    ctx.stop.check()
    with atomic_folder(run.path / "final") as partial, tensor_errors(run.path / "final"):
        ctx.student.save_pretrained(partial)
        ctx.tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(model_card(config, report, ctx.data, run))
    if report is not None:
        inspected = inspect_final(run.path / "final", ctx.tokenizer)
        if report.get("final") != inspected:
            run.write_json("report.json", {**report, "final": inspected})
    ctx.say(f"done: {run.path / 'final'}")
