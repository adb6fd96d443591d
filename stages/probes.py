"""Retrieval by length and depth: a needle, one of several keys, a table of keys and values, and copying a list.

Each question is filler of a given length with the facts at a given depth (0 the beginning, 1 the end), then a question
with FACTS possible answers. Synthetic, offline, seeded; `retrieval.accuracy` asks them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .chat import start_tokens
from .retrieval import CITIES, FACTS, NAMES, Probe, accuracy, drawn, told_apart
from .scores import Candidate

PAIRS = 8

# what is stated, each part with its depth relative to the one asked for; the question; the right word; the words
Question = tuple[list[tuple[float | None, str]], str, str, list[str]]


def _needle(rng: random.Random) -> Question:
    words = rng.sample(CITIES, FACTS)
    return [(None, f"\nThe secret word is {words[0]}.\n")], "\n\nThe secret word is", words[0], words


def _multi_key(rng: random.Random) -> Question:
    names, words = rng.sample(NAMES, FACTS), rng.sample(CITIES, FACTS)
    stated = [f"\nThe secret word of {n} is {w}.\n" for n, w in zip(names, words, strict=True)]
    others = [((i + 0.5) / (FACTS - 1), s) for i, s in enumerate(stated[1:])]
    return [(None, stated[0]), *others], f"\n\nThe secret word of {names[0]} is", words[0], words


def _key_value(rng: random.Random) -> Question:
    names, words = rng.sample(NAMES, PAIRS), rng.sample(CITIES, PAIRS)
    asked = rng.randrange(PAIRS)
    others = rng.sample([w for w in words if w != words[asked]], FACTS - 1)
    table = "\n" + "".join(f"{n}: {w}\n" for n, w in zip(names, words, strict=True))
    return [(None, table)], f"\n\n{names[asked]}:", words[asked], [words[asked], *others]


def _copying(rng: random.Random) -> Question:
    words = rng.sample(CITIES, PAIRS)
    asked = rng.randrange(2, PAIRS)
    others = rng.sample([w for w in words if w != words[asked]], FACTS - 1)
    stated, begun = "\nThe list: " + ", ".join(words) + ".\n", "\n\nThe list: " + ", ".join(words[:asked]) + ","
    return [(None, stated)], begun, words[asked], [words[asked], *others]


TASKS: dict[str, Callable[[random.Random], Question]] = {
    "needle": _needle,
    "multi-key": _multi_key,
    "key-value": _key_value,
    "copying": _copying,
}


def make_task(
    task: str, tokenizer: Any, filler_L: Tensor, length: int, depth: float, count: int, seed: int
) -> list[Probe]:
    """`count` questions of `task`, each of `length` tokens unless its facts alone are longer; the guess rate is 1/4."""
    rng = random.Random(f"{seed} {task} {length} {depth}")
    return [drawn(lambda: _probe(TASKS[task](rng), tokenizer, filler_L, length, depth, rng)) for _ in range(count)]


def _probe(
    question: Question, tokenizer: Any, filler_L: Tensor, length: int, depth: float, rng: random.Random
) -> Probe | None:
    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    stated, asked, right, words = question
    placed = sorted((depth if place is None else place, encode(text)) for place, text in stated)
    answers = told_apart(tokenizer, asked, words)
    if answers is None:
        return None
    end, choice_of, tokens = answers[0], dict(zip(words, answers[1], strict=True)), start_tokens(tokenizer)
    room = max(0, length - len(tokens) - len(end) - sum(len(t) for _, t in placed))
    start = rng.randrange(max(1, len(filler_L) - room))
    filler = filler_L[start : start + room].tolist()
    used = 0
    for place, text in placed:
        reach = round(place * room)
        tokens += [*filler[used:reach], *text]
        used = reach
    order = rng.sample(words, len(words))
    choices = tuple(choice_of[word] for word in order)
    return Probe(torch.tensor([*tokens, *filler[used:], *end]), choices, order.index(right))


def ask_tasks(
    candidates: Sequence[Candidate],
    tokenizer: Any,
    filler_L: Tensor,
    lengths: Sequence[int],
    depths: Sequence[float],
    count: int,
    seed: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Accuracy of every candidate in every cell of task, length and depth."""
    rows = []
    for task in TASKS:
        for length in lengths:
            say(f"evaluate: {task} at {length} tokens")
            for depth in depths:
                probes = make_task(task, tokenizer, filler_L, length, depth, count, seed)
                models = {c.name: accuracy(c, probes) for c in candidates}
                rows.append({"task": task, "length": length, "depth": depth, "probes": count, "chance": 1 / FACTS,
                             "models": models})  # fmt: skip
    return rows
