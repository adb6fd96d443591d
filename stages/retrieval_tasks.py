"""The retrieval suite as task files of lm-evaluation-harness: JSON lines and YAML, synthetic, seeded, read offline.

lookup: 4 facts, then filler, then a question. multikey: 12 facts spread over the filler. needle: one fact at a depth of
the filler, its city among 3 that are not stated. copy: random words, then the same words again, of which the ninth is
asked for. Lengths are tokens of filler (copy: of the words) in the teacher's tokenizer.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from ..errors import fail
from .retrieval import CITIES, NAMES, Facts

LENGTHS = (64, 256, 1024)
DEPTHS = (0, 50, 100)
DOCUMENTS = 32
REPEATED = 8

Document = dict[str, Any]


def write_tasks(folder: Path, tokenizer: Any, filler_L: Tensor, longest: int, seed: int) -> list[int]:
    """Writes NAME.yaml and NAME.jsonl of every task whose documents fit the model; returns the lengths that do.

    Args:
        filler_L: tokens to take filler from, at least as many as the shortest length.
        longest: tokens that the model can read at once.

    Raises:
        ValueError: filler or model too short for any length.
    """
    fitting = []
    for length in (n for n in LENGTHS if n <= len(filler_L)):
        tasks = {name: _documents(f"{seed}-{name}", make) for name, make in _makers(tokenizer, filler_L, length)}
        texts = [document["text"] for documents in tasks.values() for document in documents]
        # ten more for the answer
        if max(map(len, tokenizer(texts).input_ids)) + 10 > longest:
            break
        fitting.append(length)
        for name, documents in tasks.items():
            lines = "".join(json.dumps(document) + "\n" for document in documents)
            (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(_task(name, documents[0]), sort_keys=False))
    if not fitting:
        got = f"{len(filler_L)} tokens held out, a model that reads {longest}"
        raise fail("eval --suite retrieval", f"needs {LENGTHS[0]} tokens of filler and room for them", got,
                   "Hold out more text (data.heldout_percent), or use another suite.")  # fmt: skip
    return fitting


def _documents(seed: str, make: Callable[[random.Random], Document]) -> list[Document]:
    rng = random.Random(seed)
    return [make(rng) for _ in range(DOCUMENTS)]


def _makers(tokenizer: Any, filler_L: Tensor, length: int) -> list[tuple[str, Callable[[random.Random], Document]]]:
    """(task name, what makes one of its documents) for one length."""
    woven = partial(_woven, tokenizer, filler_L, length)
    kinds: list[tuple[str, Callable[[random.Random], Document]]] = [
        (f"lookup_{length}", lambda rng: _question(woven, rng, Facts.draw(rng), lambda i: 0.0)),
        (
            f"multikey_{length}",
            lambda rng: _question(woven, rng, Facts.draw(rng, len(CITIES)), lambda i: i / len(CITIES)),
        ),
        (f"copy_{length}", partial(_copy, _word_count(tokenizer, length))),
    ]
    return kinds + [(f"needle_{length}_at_{depth}", partial(_needle, woven, depth / 100)) for depth in DEPTHS]


def _question(woven: Callable[..., str], rng: random.Random, facts: Facts, place: Callable[[int], float]) -> Document:
    sentences = [(place(i), sentence) for i, sentence in enumerate(facts.sentences())]
    return {"text": woven(rng, sentences) + facts.question(), "choices": list(facts.cities), "right": facts.right}


def _needle(woven: Callable[..., str], place: float, rng: random.Random) -> Document:
    facts = Facts.draw(rng)
    text = woven(rng, [(place, facts.sentences()[facts.right])])
    return {"text": text + facts.question(), "choices": list(facts.cities), "right": facts.right}


def _copy(words: int, rng: random.Random) -> Document:
    drawn = rng.choices(NAMES + CITIES, k=words)
    return {"text": f"{' '.join(drawn)}\n\n{' '.join(drawn[:REPEATED])}", "target": f" {drawn[REPEATED]}"}


def _word_count(tokenizer: Any, length: int) -> int:
    tokens = len(tokenizer(" ".join(NAMES + CITIES), add_special_tokens=False).input_ids)
    return max(REPEATED + 1, length * len(NAMES + CITIES) // tokens)


def _woven(
    tokenizer: Any, filler_L: Tensor, length: int, rng: random.Random, sentences: list[tuple[float, str]]
) -> str:
    """`length` tokens of filler as text, each sentence put in at its place, a share of the length."""
    start = rng.randrange(len(filler_L) - length + 1)
    filler, parts, last = filler_L[start : start + length].tolist(), [], 0
    for place, sentence in sentences:
        cut = round(place * length)
        parts += [tokenizer.decode(filler[last:cut], skip_special_tokens=True).strip(), sentence.strip()]
        last = cut
    parts.append(tokenizer.decode(filler[last:], skip_special_tokens=True).strip())
    return " ".join(part for part in parts if part)


def _task(name: str, document: Document) -> dict[str, Any]:
    """Its YAML; the data file is beside it."""
    choosing = "choices" in document
    chance = 1 / len(document["choices"]) if choosing else 1 / len(NAMES + CITIES)
    answer = {"doc_to_choice": "choices", "doc_to_target": "right"} if choosing else {"doc_to_target": "target"}
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice" if choosing else "loglikelihood",
        "doc_to_text": "text",
        **answer,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1, "chance": chance},
    }
