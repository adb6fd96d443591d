"""The one evaluator: teacher, hybrid and untrained controls on the same text, and the hybrid's insides."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ssmorph.convert.families import FamilySpec
from ssmorph.convert.modeling import hybrid_of
from ssmorph.convert.surgery import MixerChoice, start_mixer

from .alignment import Loader
from .controls import SINKS, equal_window, removed, windowed
from .data import PackedData
from .decode import decode_speed
from .generation import continuations
from .health import not_finite
from .insight import ablations, internals
from .probes import ask_tasks
from .retrieval import FACTS, accuracy, filler_of, make_probes
from .scores import Candidate, Scores, by_position, score
from .silence import own_window
from .suite import Suite

# who is asked for what was stated before, beside the teacher
RETRIEVING = ("hybrid", "window", "window_trained")
# tokens of a prompt to continue
PROMPT = 32
# the set of documents kept out of training, of all sources
HELD_OUT = "held-out documents"


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
    earlier: Sequence[tuple[str, Loader]] = (),
    further: Sequence[tuple[str, Loader]] = (),
) -> dict[str, Any]:
    """Everything report.json holds, as plain lists and numbers.

    Args:
        earlier: the name of each stage before the last, and what loads the student that it left.
        further: more students to compare with, and what loads or makes them: names of stages/report.py.
    """
    started = time.monotonic()
    layers = sorted(hybrid.mixers())
    window_tokens = equal_window(teacher, spec, hybrid.mixers(), suite.lengths[0]) if layers else 0
    # with kept heads bytes are equal at one length only
    grows = any(mixer.shape.kept for mixer in hybrid.mixers().values()) or None
    rivals = _controls(teacher, hybrid, spec, window_tokens, seed) if controls and layers else []
    beside = [Candidate(name, load()) for name, load in further]
    candidates = [Candidate("hybrid", hybrid), *rivals, *beside]
    report: dict[str, Any] = {
        "converted": layers,
        "layers": len(spec.decoder_layers(teacher)),
        "window_control": {"tokens": window_tokens, "sinks": SINKS, "context": grows and suite.lengths[0]},
        "not_finite": not_finite(hybrid),
        "text": [],
        "unfilled": [],
    }
    for length in suite.lengths:
        sets = heldout_sources(data, length, suite)
        if HELD_OUT not in [name for name, _ in sets]:
            say(f"evaluate: {HELD_OUT} in windows of {length} left out, for no window is filled")
            report["unfilled"].append(length)
        for name, sources in sets:
            size = sum(w.numel() for w in sources.values())
            say(f"evaluate: {name}, {size} tokens in windows of {length}")
            some = candidates if name != data.domain_name or suite.domain_controls else candidates[:1]
            report["text"].append({"set": name, "window": length, **_scored(teacher, some, sources)})
    report |= _inside(teacher, hybrid, spec, data, suite, earlier, say) if layers else {}
    report["retrieval"] = _retrieval(
        teacher, [c for c in candidates if c.name in RETRIEVING], data, tokenizer, suite, seed, say
    )
    report["tasks"] = _tasks(
        [Candidate("teacher", teacher), *(c for c in candidates if c.name in RETRIEVING)],
        data, tokenizer, suite, seed, say,
    )  # fmt: skip
    report["generation"] = _generation(teacher, hybrid, data, tokenizer, suite, say)
    report["decode"] = {
        name: [decode_speed(model, context) for context in suite.decode_contexts]
        for name, model in (("teacher", teacher), ("hybrid", hybrid))
    }
    report["seconds"] = round(time.monotonic() - started, 1)
    return report


def _scored(teacher: Any, candidates: list[Candidate], sources: dict[str, Tensor]) -> dict[str, Any]:
    """Rows of all sources together, by position, and of each source apart."""
    parts = {name: score(teacher, candidates, windows_WL) for name, windows_WL in sources.items()}
    names = next(iter(parts.values()))
    merged = {model: Scores.merged([p[model] for p in parts.values()]) for model in names}
    return {
        "models": {model: {**s.summary(), "by_position": by_position(s)} for model, s in merged.items()},
        "by_source": {name: {model: s.summary() for model, s in p.items()} for name, p in parts.items()},
    }


def _inside(
    teacher: Any,
    hybrid: Any,
    spec: FamilySpec,
    data: PackedData,
    suite: Suite,
    earlier: Sequence[tuple[str, Loader]],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """What needs mixers: who does the work, layers added one by one, matrices and alignment."""
    sets = heldout_sets(data, suite.lengths[0], suite)
    if not sets:
        return {}
    windows_WL = sets[0][1]
    few_WL = windows_WL[: max(1, suite.work_tokens // windows_WL.shape[1])]
    say(f"evaluate: states silenced, layers added, on {few_WL.numel()} tokens; then layer by layer")
    return {
        **ablations(teacher, hybrid, spec, few_WL, suite.added),
        **internals(teacher, hybrid, spec, windows_WL[: max(1, suite.aligned_tokens // windows_WL.shape[1])], earlier),
    }


def heldout_sources(data: PackedData, length: int, suite: Suite) -> list[tuple[str, dict[str, Tensor]]]:
    """Held-out documents, in equal parts from each source, then the untrained domain: (name, windows by source)."""
    names = [n for n in data.heldout_names() if n != data.domain_name]
    share = max(length, suite.tokens // max(1, len(names)))
    left = max(1, suite.tokens // length)
    together: dict[str, Tensor] = {}
    for name in names:
        windows_WL = data.heldout_windows(name, length, share)[:left]
        if len(windows_WL):
            together[name] = windows_WL
        left -= len(windows_WL)
    sets = [(HELD_OUT, together)]
    if data.domain_name is not None:
        windows_WL = data.heldout_windows(data.domain_name, length, max(length, suite.domain_tokens))
        sets.append((data.domain_name, {data.domain_name: windows_WL} if len(windows_WL) else {}))
    return [(name, sources) for name, sources in sets if sources]


def heldout_sets(data: PackedData, length: int, suite: Suite) -> list[tuple[str, Tensor]]:
    """(name, windows) of `heldout_sources`, the sources of a set together."""
    return [(name, torch.cat(list(sources.values()))) for name, sources in heldout_sources(data, length, suite)]


def _controls(teacher: Any, hybrid: Any, spec: FamilySpec, tokens: int, seed: int) -> list[Candidate]:
    """The copy, no attention, and windows: the mixer's own, and of `tokens`.

    Of a mixer with a window the copy is that window alone, and not scored twice, unless heads are kept whole.
    """
    mixers = hybrid.mixers()
    layers = sorted(mixers)
    own = own_window(next(iter(mixers.values())))
    starts = []
    if own is None or any(mixer.shape.kept for mixer in mixers.values()):
        torch.manual_seed(seed)
        copies = {i: start_mixer(teacher, spec, i, MixerChoice.of(m)) for i, m in mixers.items()}
        starts.append(Candidate("copy", hybrid_of(teacher, copies, "control")))
    if own is not None:
        cut = partial(windowed, teacher, spec, layers, sum(own), own[1])
        starts.append(Candidate("own_window", teacher, cut))
    return [
        *starts,
        Candidate("removed", teacher, partial(removed, teacher, spec, layers)),
        Candidate("window", teacher, partial(windowed, teacher, spec, layers, tokens)),
    ]


def _retrieval(
    teacher: Any,
    candidates: list[Candidate],
    data: PackedData,
    tokenizer: Any,
    suite: Suite,
    seed: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    filler = filler_of(data)
    if not len(filler) or not suite.retrieval_probes:
        return []
    rows = []
    for distance in _reached("retrieval", suite.retrieval_distances, len(filler), say):
        probes = make_probes(tokenizer, filler, distance, suite.retrieval_probes, seed)
        models = {c.name: accuracy(c, probes) for c in [Candidate("teacher", teacher), *candidates]}
        rows.append({"distance": distance, "probes": len(probes), "chance": 1 / FACTS, "models": models})
    return rows


def _tasks(
    candidates: list[Candidate], data: PackedData, tokenizer: Any, suite: Suite, seed: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    filler = filler_of(data)
    if not len(filler) or not suite.task_probes:
        return []
    lengths = _reached("tasks", suite.task_lengths, len(filler), say)
    return ask_tasks(candidates, tokenizer, filler, lengths, suite.task_depths, suite.task_probes, seed, say)


def _reached(what: str, lengths: Sequence[int], held_out: int, say: Callable[[str], None]) -> list[int]:
    """The lengths that held-out text can fill; the others are named."""
    short = [str(n) for n in lengths if n > held_out]
    if short:
        say(f"evaluate: {what} at {', '.join(short)} tokens left out, for {held_out} tokens are held out")
    return [n for n in lengths if n <= held_out]


def _generation(
    teacher: Any, hybrid: Any, data: PackedData, tokenizer: Any, suite: Suite, say: Callable[[str], None]
) -> dict[str, Any] | None:
    sets = heldout_sets(data, PROMPT, suite)
    if not sets:
        return None
    windows_WL = sets[0][1]
    # spread over the sources, which follow one another
    chosen = torch.linspace(0, len(windows_WL) - 1, min(suite.prompts, len(windows_WL))).long()
    say(f"evaluate: {len(chosen)} continuations of {suite.new_tokens} tokens")
    return continuations(
        teacher, {"teacher": teacher, "hybrid": hybrid}, tokenizer, windows_WL[chosen], suite.new_tokens
    )
