"""The page: header with the headline numbers, the verdict, and every section, a missing one by name."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path

from ..rundir import atomic_write
from ..verdict import unchecked, verdict
from . import abilities, insides, results
from .elements import Html, number, paragraph, percent
from .run_files import RunFiles, read_run

STYLE = Path(__file__).with_name("style.css")

Section = tuple[str, str, Callable[[RunFiles], Html | None], str]

# anchor, heading, what draws it, what is missing where it draws nothing
SECTIONS: tuple[Section, ...] = (
    ("stages", "What was done, and its cost", insides.stages, "the stages"),
    ("controls", "Against its teacher and the controls", results.controls, "scores on held-out text"),
    ("domains", "By domain", results.domains, "scores by source of text"),
    ("positions", "By position in the window", results.positions, "scores by position"),
    ("work", "What the states are worth", results.work, "the hybrid with its states silenced"),
    ("added", "As layers are added", results.added, "hybrids with fewer layers converted"),
    ("loyalty", "Loyalty to the teacher", results.loyalty, "label, probability and rank"),
    ("matrices", "Attention maps and mixing matrices", insides.matrices, "mixing matrices beside attention maps"),
    ("alignment", "Alignment, layer by layer", insides.alignment, "errors of each layer after each stage"),
    ("losses", "Loss curves", insides.losses, "losses, since no stage trained by gradients"),
    ("retrieval", "Retrieval", abilities.retrieval, "retrieval"),
    ("generation", "What it writes", abilities.generation, "continuations beside the teacher's"),
    ("decoding", "Speed and memory of decoding", abilities.decoding, "decoding"),
    ("recipe", "Recipe", insides.recipe, "the recipe"),
)


def write_report(folder: Path, suite: str | None = None) -> Path:
    """Draws a run's report into RUN/report.html.

    Raises:
        ValueError: no run, or one that was not evaluated.
    """
    page = render(read_run(folder, suite))
    atomic_write(folder / "report.html", page)
    return folder / "report.html"


def render(run: RunFiles) -> str:
    """The whole page."""
    links = "".join(f'<li><a href="#{anchor}">{escape(heading)}</a></li>' for anchor, heading, _, _ in SECTIONS)
    body = "\n".join(_section(run, *section) for section in SECTIONS)
    title = f"{run.config.teacher.source} as a hybrid: {run.name}"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE.read_text()}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1>{_headline(run)}"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>\n'
        f"<main>\n{_verdict(run)}\n{body}\n</main>\n"
        "<footer>Drawn by ssmorph from the files of the run. Nothing is loaded from elsewhere.</footer>\n"
        "</body>\n</html>\n"
    )


def _section(run: RunFiles, anchor: str, heading: str, draw: Callable[[RunFiles], Html | None], what: str) -> str:
    drawn = draw(run)
    inside = paragraph(f"Not measured: {what}.", "missing") if drawn is None else drawn
    return f'<section id="{anchor}"><h2>{escape(heading)}</h2>\n{inside}\n</section>'


def _headline(run: RunFiles) -> str:
    layers, total = run.report.get("converted") or [], run.report.get("layers")
    of = f"{len(layers)} of {total}" if total else str(len(layers))
    lead = paragraph(f"{of} attention layers became {run.config.student.mixer}.", "lead")
    text = run.report.get("text") or []
    if not text:
        return lead + paragraph("Not measured: closeness to the teacher.", "missing")
    own, taught = text[0]["models"]["hybrid"], text[0]["models"]["teacher"]
    facts = [
        ("KL to the teacher (nats)", number(own["kl"], 3)),
        ("top-1 agreement", percent(own["top1"])),
        ("perplexity, x teacher", number(own["perplexity"] / taught["perplexity"])),
        ("warnings", str(len(verdict(run.report)))),
    ]
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    return lead + f'<dl class="facts">{cells}</dl>' + paragraph(f"On {text[0]['set']}.", "lead")


def _verdict(run: RunFiles) -> str:
    found, missing = verdict(run.report), unchecked(run.report)
    if found:
        items = "".join(f"<li><strong>{escape(w.name)}</strong>{escape(w.text)}</li>" for w in found)
        inside = f'<ul class="warnings">{items}</ul>'
    else:
        inside = paragraph("No warning: every rule that could be checked was passed.", "good")
    if missing:
        inside += paragraph(f"Not checked, since their measurements are missing: {', '.join(missing)}.", "missing")
    return f'<section id="verdict"><h2>Verdict</h2>\n{inside}\n</section>'
