"""Key-value retrieval against distance: facts, then filler, then a question; which of the stated values is likeliest?

Perplexity on short windows cannot show what a state remembers; this can. Synthetic, offline, seeded.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .scores import Candidate

NAMES = ("Alice", "Boris", "Carla", "David", "Elena", "Frank", "Grace", "Henry", "Irene", "James", "Karen", "Louis")
CITIES = ("Paris", "London", "Berlin", "Madrid", "Rome", "Vienna", "Dublin", "Oslo", "Cairo", "Tokyo", "Lima", "Boston")
FACTS = 4


@dataclass(frozen=True)
class Probe:
    """One question: tokens up to the answer, the candidates' first tokens, and which one is right."""

    tokens_L: Tensor
    choices: tuple[int, ...]
    right: int


def make_probes(tokenizer: Any, filler_L: Tensor, distance: int, count: int, seed: int) -> list[Probe]:
    """`count` questions about a fact stated `distance` filler tokens ago; the guess rate is 1 / FACTS."""
    rng = random.Random(seed * 1_000_003 + distance)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    probes = []
    for _ in range(count):
        names, cities = rng.sample(NAMES, FACTS), rng.sample(CITIES, FACTS)
        right = rng.randrange(FACTS)
        start = rng.randrange(max(1, len(filler_L) - distance))
        stated = encode("".join(f"{name} lives in {city}. " for name, city in zip(names, cities, strict=True)))
        asked = encode(f"\n\nAs stated above, {names[right]} lives in")
        tokens = [*stated, *filler_L[start : start + distance].tolist(), *asked]
        choices = tuple(encode(" " + city)[0] for city in cities)
        probes.append(Probe(torch.tensor(tokens), choices, right))
    return probes


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
