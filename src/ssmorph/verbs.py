"""The commands as functions. Heavy imports happen inside, after what can be checked without them.

convert(recipe, *overrides, run_dir=None)     run or resume a recipe
plan(target, *overrides)                      what a conversion would do and cost
status(run_dir)                               how far a run is
evaluate_run(run_dir, suite="full")           measure a finished run again
report(run_dir)                               the measurements as one HTML file
generate(folder, prompt)                      text from a converted hybrid
export(run_dir)                               the hybrid as an architecture that other software has
pack(out, teacher, *sources)                  what a corpus becomes
store_logits(recipe, *overrides)              the teacher's logits, stored before training
doctor()                                      what works on this machine
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import fail, nearest

OWN_SUITES, TASK_SUITES = ("short", "full"), ("mohawk", "retrieval")


def convert(
    recipe: str | Path,
    *overrides: str,
    run_dir: str | None = None,
    until: str | None = None,
    start: str | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Runs or resumes a recipe; returns the run directory.

    Args:
        overrides: dotted changes such as `stages.logits.optim.lr=1e-4`.
        until: stop after this stage.
        start: run this stage and what follows again.

    Raises:
        ValueError: a mistake in recipe, teacher, data or disk.
    """
    from .stages.recipe import load_recipe

    config = load_recipe(recipe, overrides, **({"run_dir": str(run_dir)} if run_dir else {}))
    from .stages import pipeline

    return pipeline.convert(config, until=until, start=start, say=say)


def plan(target: str, *overrides: str, measure: bool = False) -> dict[str, Any]:
    """What converting a model or recipe would do: layers, parameters, bytes, crossover, cost. Reads no weights.

    Args:
        target: a recipe file, or a model as `teacher.source` takes it, of which half the layers are converted.
        overrides: changes such as `student.layers=all`.
        measure: read the weights after all, and measure on held-out text what each approximation and drop costs.
    """
    from .stages.recipe import load_recipe, recipe_of_model

    if target.endswith((".yaml", ".yml")):
        config = load_recipe(target, overrides)
    else:
        from .convert.teachers import load_config

        config = recipe_of_model(target, f"uniform-{load_config(target).num_hidden_layers // 2}", overrides)
    from .stages.planning import plan_of

    found = plan_of(config)
    if not measure:
        return found
    from .stages.plan_measure import measured

    return measured(config, found)


def status(run_dir: str | Path) -> dict[str, Any]:
    """How far each stage of a run is. Reads files only."""
    from .stages.checkpoint_names import newest_step
    from .stages.recipe import load_saved

    folder = Path(run_dir)
    if not (folder / "config.yaml").is_file():
        raise fail("status", "must be a run directory", str(run_dir), "Point to the folder with config.yaml.")
    config = load_saved(folder)
    stages = []
    for name in config.stage_names():
        done = folder / name / "DONE"
        state = "done" if done.exists() else "started" if (folder / name).is_dir() else "waiting"
        row: dict[str, Any] = {"stage": name, "state": state, "step": newest_step(folder / name)}
        if done.exists():
            row["summary"] = _summary(done)
        stages.append(row)
    return {
        "run": str(folder),
        "stages": stages,
        "final": (folder / "final").is_dir(),
        "report": (folder / "report.json").is_file(),
    }


def _summary(done: Path) -> Any:
    try:
        return json.loads(done.read_text())["summary"]
    except (ValueError, KeyError, TypeError) as error:
        do = "Delete the stage's folder to run it again."
        raise fail(str(done), "must be what a finished stage wrote", error, do) from error


def evaluate_run(
    run_dir: str | Path,
    suite: str = "full",
    tokens: int | None = None,
    limit: int | None = None,
    batch: int = 1,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measures a finished run with a suite, beside its teacher.

    short and full write report-SUITE.json into the run; suites of lm-eval tasks write lm-eval-SUITE.json.

    Args:
        suite: short or full, with controls; mohawk, retrieval, or a YAML task file or folder, with lm-eval.
        tokens: held-out tokens, for short and full.
        limit: documents of each lm-eval task; None is all.
        batch: sequences at a time in lm-eval tasks.

    Raises:
        ValueError: an unknown suite, an option of the other kind of suite, or a run that is not finished.
    """
    if suite in OWN_SUITES:
        if (limit, batch) != (None, 1):
            raise fail("eval", "--limit and --batch are for lm-eval tasks", f"suite {suite}", "Use --tokens.")
        if tokens is not None and tokens < 1:
            raise fail("eval", "--tokens must be 1 or more", tokens, "Leave it out for the recipe's number.")
        from .stages.reevaluate import reevaluate

        return reevaluate(Path(run_dir), suite, tokens, say)
    if suite not in TASK_SUITES and not Path(suite).exists():
        do = nearest(suite, OWN_SUITES + TASK_SUITES)
        raise fail("eval --suite", "must be a suite, or a YAML task file or folder", suite, do)
    if tokens is not None:
        raise fail("eval", "--tokens is for the suites short and full", f"suite {suite}", "Use --limit.")
    if batch < 1 or (limit is not None and limit < 1):
        raise fail("eval", "--limit and --batch must be 1 or more", f"{limit} and {batch}", "Give whole numbers.")
    from .stages.harness import evaluate_tasks

    return evaluate_tasks(Path(run_dir), suite, limit=limit, batch=batch, say=say)


def report(run_dir: str | Path, suite: str | None = None) -> Path:
    """Draws what was measured of a run into RUN/report.html: one file, no network. Measures nothing.

    Args:
        suite: whose numbers; left out, those of the full suite where it was run, else the run's own.

    Raises:
        ValueError: no run, or one that was not evaluated.
    """
    from .stages.html import write_report

    return write_report(Path(run_dir), suite)


def generate(
    folder: str | Path, prompt: str, max_new_tokens: int = 64, temperature: float = 0.0, chat: bool = False
) -> str:
    """Text that a converted hybrid continues a prompt with; greedy where temperature is 0.

    Args:
        folder: a run directory, its final/, or a hub id.
        chat: put the prompt through the tokenizer's chat template.
    """
    if max_new_tokens < 1 or temperature < 0 or not prompt:
        got = f"{max_new_tokens} tokens, temperature {temperature}, prompt {prompt!r}"
        raise fail("generate", "needs a prompt, 1 token or more, and a temperature of 0 or more", got, "Change them.")
    path = Path(folder) / "final" if (Path(folder) / "final").is_dir() else folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from . import hf  # noqa: F401  registers the classes

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path)
        model: Any = AutoModelForCausalLM.from_pretrained(path)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise fail(
            "generate", "must be a folder or hub id with a model", f"{folder}: {first}", "Point to a run's final/."
        ) from error
    if chat and not tokenizer.chat_template:
        raise fail("generate", "--chat needs a model with a chat template", str(folder), "Leave --chat out.")
    if chat:
        messages = [{"role": "user", "content": prompt}]
        prompt = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, **sampling)
    return str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def export(source: str | Path, out: str | Path | None = None, say: Callable[[str], None] = print) -> Path:
    """Writes a finished hybrid of `mamba2` layers as transformers' own granitemoehybrid; returns the folder.

    Args:
        source: a run directory, or a folder that save_pretrained wrote.
        out: where to; granitemoehybrid in the run where left out.

    Raises:
        ValueError: a hybrid that is none of this architecture, or whose logits are others when written so.
    """
    from .stages.export import export

    return export(source, out, say)


def pack(out: str | Path, teacher: str, *sources: str, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Tokenises and packs text into memory-mapped shards, for inspection.

    Raises:
        ValueError: a mistake in sources, teacher or disk, or an `out` that is something else.
    """
    from .convert.teachers import load_tokenizer
    from .stages.config import DataConfig
    from .stages.data import INDEX, open_or_pack

    config = DataConfig(sources=sources or ("default",))
    packed_before = (Path(out) / INDEX).is_file()
    packed = open_or_pack(config, load_tokenizer(teacher), Path(out), say)
    if packed_before:
        say(f"data: {out} was packed before, and nothing was read again; name another folder if the sources changed")
    return {"folder": str(out), "train_tokens": packed.train_tokens, "sources": packed.provenance}


def store_logits(
    recipe: str | Path, *overrides: str, run_dir: str | None = None, say: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Stores the teachers' logits that a recipe's logits stages with `offline` will read; the same call again goes on.

    Args:
        overrides: as in `convert`; the run must be given the same.
        run_dir: the run's folder, where the text is packed.

    Raises:
        ValueError: no stage with `offline`, or a mistake in recipe, teacher, data or disk.
    """
    from .stages.recipe import load_recipe

    config = load_recipe(recipe, overrides, **({"run_dir": str(run_dir)} if run_dir else {}))
    from .stages.store import store_logits

    return store_logits(config, say)


def doctor() -> dict[str, Any]:
    """What imports here, which kernel would run where, and how many threads are fastest."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from .stages.doctor import examine

    return examine()
