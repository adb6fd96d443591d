"""Key-value retrieval against distance: facts, then filler, then a question; which of the stated values is likeliest?

Perplexity on short windows cannot show what a state remembers; this can. Synthetic, offline, seeded.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import fail
from .chat import start_tokens
from .data import PackedData
from .scores import Candidate

NAMES = ("Alice", "Boris", "Carla", "David", "Elena", "Frank", "Grace", "Henry", "Irene", "James", "Karen", "Louis")
CITIES = ("Paris", "London", "Berlin", "Madrid", "Rome", "Vienna", "Dublin", "Oslo", "Cairo", "Tokyo", "Lima", "Boston")
FACTS = 4
# of four answers, before a tokenizer is given up
DRAWS = 1000


@dataclass(frozen=True)
class Facts:
    """Who lives where, and whose city is asked for."""

    names: tuple[str, ...]
    cities: tuple[str, ...]
    right: int

    @classmethod
    def draw(cls, rng: random.Random, count: int = FACTS) -> Facts:
        """`count` people in as many cities."""
        return cls(tuple(rng.sample(NAMES, count)), tuple(rng.sample(CITIES, count)), rng.randrange(count))

    def sentences(self) -> list[str]:
        """One a fact, ending with a space."""
        return [f"{name} lives in {city}. " for name, city in zip(self.names, self.cities, strict=True)]

    def question(self) -> str:
        """What the right city, after a space, continues."""
        return f"\n\nAs stated above, {self.names[self.right]} lives in"


@dataclass(frozen=True)
class Probe:
    """One question: tokens up to the answer, the candidates' first tokens, and which one is right."""

    tokens_L: Tensor
    choices: tuple[int, ...]
    right: int


def filler_of(data: PackedData) -> Tensor:
    """Tokens [L] of held-out documents to put between fact and question; empty where a run holds none out."""
    names = [n for n in data.heldout_names() if n != data.domain_name]
    parts = [data.heldout_windows(n, 64, 8192, raw=True).flatten() for n in names]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def make_probes(tokenizer: Any, filler_L: Tensor, distance: int, count: int, seed: int) -> list[Probe]:
    """`count` questions about a fact stated `distance` filler tokens ago; the guess rate is 1 / FACTS."""
    rng = random.Random(seed * 1_000_003 + distance)

    def probe() -> Probe | None:
        facts = Facts.draw(rng)
        start = rng.randrange(max(1, len(filler_L) - distance))
        answers = told_apart(tokenizer, facts.question(), facts.cities)
        if answers is None:
            return None
        asked, choices = answers
        stated = tokenizer("".join(facts.sentences()), add_special_tokens=False).input_ids
        tokens = [*start_tokens(tokenizer), *stated, *filler_L[start : start + distance].tolist(), *asked]
        return Probe(torch.tensor(tokens), choices, facts.right)

    return [drawn(probe) for _ in range(count)]


def told_apart(tokenizer: Any, asked: str, words: Sequence[str]) -> tuple[list[int], tuple[int, ...]] | None:
    """Tokens of a question and of what all answers to it begin with, and the token by which each answer goes on.

    A tokenizer may put the space before a word, or its first letters, into tokens of their own. None where two answers
    share the token that tells others apart.
    """
    whole = [tokenizer(f"{asked} {word}", add_special_tokens=False).input_ids for word in words]
    shared = next((i for i, column in enumerate(zip(*whole, strict=False)) if len(set(column)) > 1), None)
    if shared is None:
        return None
    choices = tuple(tokens[shared] for tokens in whole)
    return (whole[0][:shared], choices) if len(set(choices)) == len(choices) else None


def drawn(draw: Callable[[], Probe | None]) -> Probe:
    """The first probe of `draw` whose answers can be told apart.

    Raises:
        ValueError: a tokenizer in which no draw's can.
    """
    for _ in range(DRAWS):
        probe = draw()
        if probe is not None:
            return probe
    raise fail("evaluate", "four cities must differ in one token", "a tokenizer in which none do", "Use suite: none.")


@torch.no_grad()
def accuracy(candidate: Candidate, probes: list[Probe]) -> float:
    """Share of probes whose right value is the likeliest of those stated."""
    hits = 0
    with candidate.context():
        for probe in probes:
            model = candidate.model
            hidden = model.base_model(probe.tokens_L[None].to(model.device), use_cache=False).last_hidden_state[0, -1]
            logits = model.get_output_embeddings()(hidden)[list(probe.choices)]
            hits += int(logits.argmax()) == probe.right
    return hits / len(probes)
