"""The command line: few verbs, each a thin layer over the function of the same name."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import tyro

from . import __doc__ as summary
from . import __version__, verbs
from .errors import UserError


def convert(
    recipe: tyro.conf.Positional[str],
    overrides: tyro.conf.Positional[tuple[str, ...]] = (),
    run_dir: str | None = None,
    until: str | None = None,
    from_: Annotated[str | None, tyro.conf.arg(name="from")] = None,
    quiet: bool = False,
) -> None:
    """Run a recipe, or resume it: the same command again continues where it stopped.

    Args:
        recipe: a YAML recipe.
        overrides: changes such as stages.logits.optim.lr=1e-4.
        run_dir: where to write, instead of the recipe's run_dir.
        until: stop after this stage.
        from_: run this stage and all after it again.
        quiet: print only the result.
    """
    say = (lambda text: None) if quiet else _line
    path = verbs.convert(recipe, *overrides, run_dir=run_dir, until=until, start=from_, say=say)
    if (path / "report.json").is_file() and until is None:
        _print_report(json.loads((path / "report.json").read_text()))
        _curves(path)
        print(f"report: {verbs.report(path)}")


def plan(
    target: tyro.conf.Positional[str],
    overrides: tyro.conf.Positional[tuple[str, ...]] = (),
    measure: bool = False,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Show what a conversion would do and cost, before anything is trained.

    Args:
        target: a recipe, or a model: folder, GGUF file, hub id or alias.
        overrides: changes such as student.layers=all.
        measure: read the weights and measure on held-out text what each approximation and drop costs.
        as_json: print JSON.
    """
    result = verbs.plan(target, *overrides, measure=measure)
    if as_json:
        print(json.dumps(result, indent=1))
        return
    from .stages.plan_table import print_plan

    print_plan(result)


def status(run: tyro.conf.Positional[str]) -> None:
    """Show how far each stage of a run is.

    Args:
        run: a run directory.
    """
    result = verbs.status(run)
    for row in result["stages"]:
        step = "" if row["step"] is None else f" (checkpoint at step {row['step']})"
        print(f"{row['stage']:16} {row['state']}{step}")
    print(f"final: {'yes' if result['final'] else 'no'}, report: {'yes' if result['report'] else 'no'}")


def evaluate(
    run: tyro.conf.Positional[str],
    suite: str = "full",
    tokens: int | None = None,
    limit: int | None = None,
    batch: int = 1,
) -> None:
    """Measure a finished run beside its teacher.

    Args:
        run: a run directory.
        suite: short is what the demo prints; full adds long windows, retrieval over distance and 16k decoding.
            With lm-eval: mohawk (the paper's tasks), retrieval (offline), or a YAML task file or folder.
        tokens: held-out tokens, instead of the recipe's number (short, full).
        limit: documents of each task (lm-eval).
        batch: sequences at a time (lm-eval).
    """
    report = verbs.evaluate_run(run, suite, tokens, limit, batch, _line)
    if suite in verbs.OWN_SUITES:
        _print_report(report)
    else:
        from .stages.report import tasks_table

        _console().print(tasks_table(report))


def report(run: tyro.conf.Positional[str], suite: Literal["short", "full"] | None = None) -> None:
    """Draw what was measured of a run into one HTML file, report.html, with a verdict in words.

    Args:
        run: a run directory.
        suite: whose numbers; left out, those of the full suite where it was run.
    """
    print(verbs.report(run, suite))


def generate(
    model: tyro.conf.Positional[str],
    prompt: tyro.conf.Positional[str],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    chat: bool = False,
) -> None:
    """Continue a prompt with a converted hybrid.

    Args:
        model: a run directory, its final folder, or a hub id.
        prompt: the text to continue.
        max_new_tokens: how many tokens at most.
        temperature: 0 is greedy.
        chat: use the model's chat template.
    """
    print(verbs.generate(model, prompt, max_new_tokens, temperature, chat))


def export(run: tyro.conf.Positional[str], out: str | None = None) -> None:
    """Write a hybrid of mamba2 layers as granitemoehybrid, which loads without this package.

    Args:
        run: a run directory, or a hybrid's folder.
        out: where to, instead of granitemoehybrid in the run.
    """
    verbs.export(run, out, say=_line)


def data_pack(
    out: tyro.conf.Positional[str],
    sources: tyro.conf.Positional[tuple[str, ...]] = ("default",),
    teacher: str = "smollm2-135m",
) -> None:
    """Tokenise and pack text into memory-mapped shards.

    Args:
        out: folder to write.
        sources: 'default', files, folders or hub:NAME.
        teacher: whose tokenizer.
    """
    print(json.dumps(verbs.pack(out, teacher, *sources, say=_line), indent=1))


def data_logits(
    recipe: tyro.conf.Positional[str],
    overrides: tyro.conf.Positional[tuple[str, ...]] = (),
    run_dir: str | None = None,
) -> None:
    """Store the teacher's logits that a recipe's logits stages read where they have `offline: FOLDER`.

    Args:
        recipe: a YAML recipe.
        overrides: changes, the same that convert is given.
        run_dir: the run's folder, instead of the recipe's run_dir.
    """
    print(json.dumps(verbs.store_logits(recipe, *overrides, run_dir=run_dir, say=_line), indent=1))


def doctor(as_json: Annotated[bool, tyro.conf.arg(name="json")] = False) -> None:
    """Show what this machine has: packages that really import, kernels that would run, and the thread policy.

    Args:
        as_json: print JSON.
    """
    result = verbs.doctor()
    if as_json:
        print(json.dumps(result, indent=1))
        return
    for section, rows in result.items():
        print(f"{section}:")
        for name, value in rows.items():
            print(f"  {name}: {value}")


def _line(text: str) -> None:
    print(text, flush=True)


def _print_report(report: dict[str, Any]) -> None:
    from .stages.report import print_report

    print_report(report, _console())


def _console() -> Any:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 110)


def _curves(path: Any) -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        print("loss curves: not drawn, matplotlib is missing (pip install 'ssmorph[report]')")
        return
    if (path / "metrics.jsonl").is_file():
        from .stages.report import draw_losses

        for file in draw_losses(path / "metrics.jsonl", path):
            print(f"loss curve: {file}")


def run(arguments: Sequence[str]) -> int:
    """Runs one command; returns its exit code."""
    app = tyro.extras.SubcommandApp()
    commands: dict[str, Callable[..., None]] = {
        "convert": convert, "plan": plan, "status": status, "eval": evaluate, "report": report,
        "generate": generate, "export": export, "data-pack": data_pack, "data-logits": data_logits, "doctor": doctor,
    }  # fmt: skip
    for name, function in commands.items():
        app.command(name=name)(function)
    # `ssmorph data pack` reads better than a hyphen
    words = list(arguments)
    if words == ["--version"]:
        print(f"ssmorph {__version__}")
        return 0
    if words[:2] in (["data", "pack"], ["data", "logits"]):
        words[:2] = ["-".join(words[:2])]
    try:
        app.cli(args=words, prog="ssmorph", description=summary.splitlines()[0])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        print(f"stopped by {error}; the same command resumes", file=sys.stderr)
        return int(code)
    return 0
