"""Tasks of lm-evaluation-harness (lm-eval): teacher and hybrid from memory, the same tasks, examples and seed."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from ..errors import fail
from .reevaluate import check_finished, opened
from .retrieval import filler_of
from .retrieval_tasks import write_tasks
from .rundir import atomic_folder

# table 1 of the MOHAWK paper
MOHAWK = ("winogrande", "arc_easy", "arc_challenge", "piqa", "hellaswag", "lambada_openai")
# where lm-eval keeps them: reading all of its 14,000 tasks takes seconds
FOLDERS = ("winogrande", "arc", "piqa", "hellaswag", "lambada")
# resamplings behind the stderr of metrics that have no formula for it, such as perplexity
BOOTSTRAP = 1000


def evaluate_tasks(
    folder: Path, suite: str, *, limit: int | None, batch: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Runs a suite on a finished run's teacher and hybrid; writes lm-eval-SUITE.json into the run.

    Args:
        suite: mohawk, retrieval, or a YAML task file or folder of them.
        limit: documents of each task, from its first; None is all.
        batch: sequences at a time.

    Raises:
        ValueError: lm-eval is missing, a task or its data cannot be loaded, or the run is not finished.
    """
    if find_spec("lm_eval") is None:
        raise fail("eval --suite", f"{suite} needs lm-eval", "not installed", "Run: pip install 'ssmorph[eval]'.")
    check_finished(folder)
    # what can fail without a model fails before one is loaded
    tasks = None if suite == "retrieval" else mohawk_tasks() if suite == "mohawk" else tasks_from(Path(suite))
    with opened(folder, say) as (run, config, teacher, student, data, tokenizer):
        if tasks is None:
            own = folder / "tasks-retrieval"
            with atomic_folder(own) as partial:
                longest = int(getattr(teacher.config, "max_position_embeddings", 2**31))
                lengths = write_tasks(partial, tokenizer, filler_of(data), longest, config.seed)
            say(f"eval: retrieval over {', '.join(map(str, lengths))} tokens, tasks in {own}")
            tasks = tasks_from(own)
        report = compare(teacher, student, tokenizer, tasks, limit=limit, batch=batch, seed=config.seed, say=say)
        report = {"suite": suite, **report}
        run.write_json(f"lm-eval-{Path(suite).stem}.json", report)
    return report


def mohawk_tasks() -> dict[str, Any]:
    """The six tasks of the paper by name.

    Raises:
        ValueError: data sets that are neither in the cache nor to be had from the hub; all of them are named.
    """
    import lm_eval.tasks

    home = Path(lm_eval.tasks.__file__).parent
    manager = lm_eval.tasks.TaskManager(include_path=[home / name for name in FOLDERS], include_defaults=False)
    tasks: dict[str, Any] = {}
    missing = []
    for name in MOHAWK:
        try:
            tasks |= manager.load([name])["tasks"]
        # no connection, no such data set, or only another part of it in the cache
        except (OSError, ValueError) as error:
            source = manager.task_index[name].cfg or {}
            missing.append((f"{source['dataset_path']} ({name})", error))
    if missing:
        raise fail(
            "eval --suite mohawk", "the data sets must be in the cache of `datasets`, or the hub within reach",
            f"neither for {', '.join(what for what, _ in missing)}: {_first_line(missing[0][1])}",
            "Run the same command once with a network, or point HF_HOME to a cache that holds them.",
        ) from missing[0][1]  # fmt: skip
    return tasks


def tasks_from(path: Path) -> dict[str, Any]:
    """Tasks of a YAML file, or of every YAML file in a folder; relative data files are looked up beside them.

    Raises:
        ValueError: no such file, or a task that lm-eval cannot load.
    """
    from lm_eval.tasks import TaskManager

    path = path.resolve()
    files = sorted(path.glob("*.yaml"), key=_natural) if path.is_dir() else [path]
    if not files or not path.exists():
        raise fail("eval --suite", "must be a YAML task file or a folder of them", path, "Check the path.")
    tasks: dict[str, Any] = {}
    manager = TaskManager(include_path=files[0].parent, include_defaults=False)
    with contextlib.chdir(files[0].parent):
        for file in files:
            try:
                loaded = manager.load([str(file)])["tasks"]
            except Exception as error:  # a task may run any code of its author's, so anything can be raised
                got = f"{type(error).__name__}: {_first_line(error)}"
                raise fail(str(file), "must be a task that lm-eval can load", got, "Mend the file or its data.") from (
                    error
                )
            tasks |= loaded
    return tasks


def compare(
    teacher: Any,
    hybrid: Any,
    tokenizer: Any,
    tasks: dict[str, Any],
    *,
    limit: int | None = None,
    batch: int = 1,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """One row for each task and metric: teacher and hybrid with standard errors, and their difference."""
    from lm_eval.models.huggingface import HFLM

    started = time.monotonic()
    _prepare(tasks)
    measured, longest = {}, None
    for name, model in (("teacher", teacher), ("hybrid", hybrid)):
        say(f"eval: {name}, {len(tasks)} tasks")
        with _quiet("lm_eval.models.huggingface"):
            # both read as much as the teacher can
            lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch, max_length=longest)
        longest = lm.max_length
        measured[name] = _measure(lm, tasks, limit, seed)
    return {
        "lm_eval": version("lm-eval"),
        "limit": limit,
        "batch": batch,
        "seed": seed,
        "rows": _rows(tasks, measured["teacher"], measured["hybrid"]),
        "seconds": round(time.monotonic() - started, 1),
    }


def _prepare(tasks: dict[str, Any]) -> None:
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)


@torch.no_grad()
def _measure(lm: Any, tasks: dict[str, Any], limit: int | None, seed: int) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate

    set_seed(seed)
    for task in tasks.values():
        task.set_fewshot_seed(seed=seed)
    return evaluate(lm=lm, task_dict={"tasks": tasks}, limit=limit, log_samples=False, bootstrap_iters=BOOTSTRAP)


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Hides one logger's warnings: HFLM warns whenever it is given a model instead of a name."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _rows(tasks: Iterable[str], teacher: dict[str, Any], hybrid: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for task in tasks:
        metrics = teacher["results"][task]
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            other = hybrid["results"][task][key]
            error = f"{metric}_stderr,{kind}"
            rows.append({
                "task": task,
                "metric": metric if kind == "none" else f"{metric} ({kind})",
                "documents": teacher["n-samples"][task]["effective"],
                "few_shot": teacher["n-shot"].get(task, 0),
                "higher_is_better": teacher["higher_is_better"].get(task, {}).get(metric),
                "chance": (teacher["configs"][task].get("metadata") or {}).get("chance"),
                "teacher": {"value": float(value), "stderr": _number(metrics.get(error))},
                "hybrid": {"value": float(other), "stderr": _number(hybrid["results"][task].get(error))},
                "difference": float(other - value),
            })  # fmt: skip
    return rows


def _number(value: Any) -> float | None:
    """lm-eval writes N/A where there is none."""
    return float(value) if isinstance(value, int | float) else None


def _natural(path: Path) -> list[str | int]:
    """Sorts lookup_64 before lookup_256."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.stem)]


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
