"""The one evaluator: teacher, hybrid and three untrained controls on the same held-out text."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ssmorph.convert.families import FamilySpec, attention_shape
from ssmorph.convert.modeling import hybrid_of
from ssmorph.convert.surgery import copy_attention

from .controls import SINKS, equal_window, removed, windowed
from .data import PackedData
from .decode import decode_speed
from .retrieval import FACTS, accuracy, filler_of, make_probes
from .scores import Candidate, by_position, score


@dataclass(frozen=True, kw_only=True)
class Suite:
    """How much is measured. Tokens are per held-out set; `lengths` are window lengths."""

    tokens: int
    domain_tokens: int
    lengths: tuple[int, ...]
    retrieval_distances: tuple[int, ...]
    retrieval_probes: int
    decode_contexts: tuple[int, ...]


def suite_named(name: str, tokens: int, window: int) -> Suite:
    """`short` fits into the demo; `full` adds long windows by position, retrieval over distance, and 16k decoding."""
    if name == "short":
        return Suite(
            tokens=tokens,
            domain_tokens=tokens // 2,
            lengths=(window,),
            retrieval_distances=(128,),
            retrieval_probes=16,
            decode_contexts=(512, 4096),
        )
    return Suite(
        tokens=4 * tokens,
        domain_tokens=tokens,
        lengths=(window, 2048),
        retrieval_distances=(64, 256, 512, 1024),
        retrieval_probes=32,
        decode_contexts=(512, 4096, 16384),
    )


@torch.no_grad()
def evaluate(
    teacher: Any,
    hybrid: Any,
    spec: FamilySpec,
    data: PackedData,
    tokenizer: Any,
    suite: Suite,
    *,
    controls: bool = True,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Everything report.json holds, as plain lists and numbers.

    Perplexity, KL(teacher || model) and top-1 agreement on held-out documents and on the held-out domain; retrieval;
    decode speed. Seconds spent are reported too.
    """
    started = time.monotonic()
    layers = sorted(hybrid.mixers())
    rivals = _controls(teacher, hybrid, spec, layers, seed) if controls and layers else []
    candidates = [Candidate("hybrid", hybrid), *rivals]
    window_tokens = _window(teacher, hybrid) if layers else 0
    report: dict[str, Any] = {
        "converted": layers,
        "window_control": {"tokens": window_tokens, "sinks": SINKS},
        "text": [],
    }
    for length in suite.lengths:
        for name, windows_WL in heldout_sets(data, length, suite):
            say(f"evaluate: {name}, {windows_WL.numel()} tokens in windows of {length}")
            scored = score(teacher, candidates if name != data.domain_name else candidates[:1], windows_WL)
            rows = {k: {**s.summary(), "by_position": by_position(s)} for k, s in scored.items()}
            report["text"].append({"set": name, "window": length, "models": rows})
    report["retrieval"] = _retrieval(
        teacher, [c for c in candidates if c.name in ("hybrid", "window")], data, tokenizer, suite, seed
    )
    report["decode"] = {
        name: [decode_speed(model, context) for context in suite.decode_contexts]
        for name, model in (("teacher", teacher), ("hybrid", hybrid))
    }
    report["seconds"] = round(time.monotonic() - started, 1)
    return report


def heldout_sets(data: PackedData, length: int, suite: Suite) -> list[tuple[str, Tensor]]:
    """(name, windows): all held-out documents together, in equal parts from each source, then the untrained domain."""
    names = [n for n in data.heldout_names() if n != data.domain_name]
    share = max(length, suite.tokens // max(1, len(names)))
    parts = [data.heldout_windows(n, length, share) for n in names]
    sets = (
        [("held-out documents", torch.cat([p for p in parts if len(p)])[: max(1, suite.tokens // length)])]
        if names
        else []
    )
    if data.domain_name is not None:
        sets.append(
            (data.domain_name, data.heldout_windows(data.domain_name, length, max(length, suite.domain_tokens)))
        )
    return [(name, windows) for name, windows in sets if len(windows)]


def _window(teacher: Any, hybrid: Any) -> int:
    mixer = next(iter(hybrid.mixers().values()))
    return equal_window(mixer.shape, attention_shape(teacher.config), teacher.dtype)


def _controls(teacher: Any, hybrid: Any, spec: FamilySpec, layers: list[int], seed: int) -> list[Candidate]:
    mixers = hybrid.mixers()
    torch.manual_seed(seed)
    copies = {i: copy_attention(teacher, spec, i, m.kind, m.shape.conv_kernel) for i, m in mixers.items()}
    tokens = _window(teacher, hybrid)
    return [
        Candidate("copy", hybrid_of(teacher, copies, "control")),
        Candidate("removed", teacher, partial(removed, teacher, spec, layers)),
        Candidate("window", teacher, partial(windowed, teacher, spec, layers, tokens)),
    ]


def _retrieval(
    teacher: Any, candidates: list[Candidate], data: PackedData, tokenizer: Any, suite: Suite, seed: int
) -> list[dict[str, Any]]:
    filler = filler_of(data)
    if not len(filler) or not suite.retrieval_probes:
        return []
    rows = []
    for distance in suite.retrieval_distances:
        probes = make_probes(tokenizer, filler, distance, suite.retrieval_probes, seed)
        models = {c.name: accuracy(c, probes) for c in [Candidate("teacher", teacher), *candidates]}
        rows.append({"distance": distance, "probes": len(probes), "chance": 1 / FACTS, "models": models})
    return rows
