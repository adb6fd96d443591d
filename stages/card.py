"""The model card of a converted hybrid: recipe, data, tokens, results, limits."""

from __future__ import annotations

from typing import Any

from .config import RunConfig, TrainStage
from .data import PackedData
from .recipe import dump
from .report import NAMES, against_window
from .rundir import RunDir
from .verdict import verdict

LIMITS = """A recurrent state cannot be cropped: assisted generation and static caches are refused. Batched prompts are
padded on the left; generation cannot continue from a right-padded prompt."""


def model_card(config: RunConfig, report: dict[str, Any] | None, data: PackedData, run: RunDir) -> str:
    """Markdown for final/README.md."""
    trained = sum(stage.tokens for stage in config.stages if isinstance(stage, TrainStage))
    plan = run.read_json("plan.json")
    lines = [
        "---", "library_name: transformers", "tags: [ssmorph, mamba2, hybrid]", "---",
        f"# {config.teacher.source} as a Mamba-2 hybrid", "",
        f"Converted by ssmorph: layers {plan['layers']} are `{plan['mixer']}`, the others keep their attention."
        + (f" {len(plan['heads'])} heads of converted layers stay attention." if plan.get("heads") else ""),
        f"Trained on {trained} tokens in windows of {config.data.window}, seed {config.seed}.", "",
        "```python", "import ssmorph.hf", "from transformers import AutoModelForCausalLM, AutoTokenizer",
        'model = AutoModelForCausalLM.from_pretrained("this folder")', "```", "",
        "Without ssmorph, slower: leave out the first line and pass `trust_remote_code=True`.", "", "## Data", "",
    ]  # fmt: skip
    lines += [
        f"- {p['source']}: {p['documents']} documents, {p['bytes']} bytes, {p['licence']}" for p in data.provenance
    ]
    lines += ["", "## Results", ""]
    for text in report["text"] if report else []:
        base = text["models"]["teacher"]["perplexity"]
        lines += [
            f"{text['set']}, windows of {text['window']} tokens:",
            "",
            "| model | perplexity | x teacher | KL | top-1 |",
            "|---|---|---|---|---|",
        ]
        for name, row in text["models"].items():
            numbers = f"{row['perplexity']:.2f} | {row['perplexity'] / base:.2f} | {row['kl']:.3f} | {row['top1']:.3f}"
            lines.append(f"| {NAMES[name]} | {numbers} |")
        lines.append("")
    lines += [*against_window(report), ""] if report else ["Not evaluated."]
    lines += [f"- Warning, {w.name}: {w.text}" for w in verdict(report or {})]
    lines += ["", "## Limits", "", LIMITS, "", "## Recipe", "", "```yaml", dump(config).strip(), "```", ""]
    return "\n".join(lines)
