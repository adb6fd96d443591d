"""What the numbers of a report say in words: named warnings, each by a rule whose threshold has its reason beside it.

Nothing is measured here. A rule whose measurement is missing is named by `unchecked`, never passed in silence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

# perplexity over the teacher's up to which readers call an average fine: 1.25 is this project's goal for pure Mamba-2
FINE_RATIO = 1.25
# of what the teacher retrieves above chance; below a half, more is lost than kept
KEPT_RETRIEVAL = 0.5
# standard errors that a difference in hits must exceed: one in twenty is by chance
ERRORS = 2.0
# nats that silencing every state must cost: about what an untrained window of equal bytes costs at 15 of 30 layers
IDLE_KL = 0.05
# share of a mixer's output that goes with its state: float32 noise is 1e-6, and calibrated layers are above 0.1
DEAD_SHARE = 0.01
# repeated 4-grams above the teacher's own, and at least: a third of a text said twice is no longer an answer
MORE_REPEATED, MUCH_REPEATED = 0.2, 1 / 3
# nats per token by which the teacher finds the student's greedy text less likely than its own: a factor e
UNLIKELY = 1.0
# of the teacher's length, below which a student stops talking
SHORT_ANSWER = 0.25
# KL in nats, and as a multiple of the log of the perplexity ratio, above which the ratio hides damage: for a student
# that only lost information the two are about equal
LARGE_KL, HIDDEN = 0.2, 2.5


class NamedWarning(NamedTuple):
    """One thing that is wrong, under a name that does not change, in a sentence with its numbers."""

    name: str
    text: str


Report = dict[str, Any]


def verdict(report: Report) -> list[NamedWarning]:
    """The warnings that a report deserves, the gravest first."""
    return [NamedWarning(name, text) for name, _, rule in RULES for text in rule(report)]


def unchecked(report: Report) -> list[str]:
    """Names of the rules whose measurement the report lacks."""
    return [name for name, needs, _ in RULES if not _measured(report, needs)]


def _measured(report: Report, needs: str) -> bool:
    """Whether the report has this part; `text/NAME`: whether a held-out set was scored for that model."""
    part, _, model = needs.partition("/")
    return bool(report.get(part)) if not model else any(True for _ in _text(report, model))


def _text(report: Report, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what, rows by model) of every held-out set on which both the hybrid and `name` were scored."""
    for text in report.get("text") or []:
        if name in text["models"] and "hybrid" in text["models"]:
            yield f"{text['set']} in windows of {text['window']}", text["models"]


def _ratio(models: dict[str, Any], other: str = "teacher") -> float:
    return models["hybrid"]["perplexity"] / models[other]["perplexity"]


def _fine(report: Report) -> bool:
    ratios = [_ratio(models) for _, models in _text(report, "teacher")]
    return bool(ratios) and max(ratios) <= FINE_RATIO


def _not_finite(report: Report) -> Iterator[str]:
    bad = report.get("not_finite") or []
    if bad:
        yield f"{len(bad)} parameters of the hybrid hold NaN or infinity, the first is {bad[0]}."
    for what, models in _text(report, "teacher"):
        wrong = [key for key in ("perplexity", "kl") if not math.isfinite(models["hybrid"][key])]
        if wrong:
            yield f"On {what} the hybrid's {' and '.join(wrong)} is no finite number."


def _no_text(report: Report) -> Iterator[str]:
    unfilled = report.get("unfilled") or []
    # windows of the full suite that are too long are no loss beside those of the run
    if unfilled and not report.get("text"):
        yield (
            f"No held-out text fills a window of {min(unfilled)} tokens: perplexity and KL were not measured. Add text,"
            " raise data.heldout_percent or lower data.window."
        )


def _tokenizer(report: Report) -> Iterator[str]:
    differences = (report.get("final") or {}).get("tokenizer_differences")
    if differences:
        yield f"The tokenizer in final/ is not the teacher's: other {', '.join(differences)}."


def _states(report: Report) -> Iterator[str]:
    work = report.get("work")
    if not work or "silenced" not in work["models"]:
        return
    aligned = report.get("alignment")
    if aligned and all(share is None for share in aligned["state_share"]):
        # a window has no state that could be idle
        return
    rows = work["models"]
    cost = rows["silenced"]["kl"] - rows["hybrid"]["kl"]
    if cost < IDLE_KL:
        narrow = rows.get("narrowed")
        rest = f" Narrowing the kept attention costs {narrow['kl'] - rows['hybrid']['kl']:.3f}." if narrow else ""
        yield (
            f"Silencing every recurrent state changes KL by {cost:+.3f} nats only: the kept attention or a window does"
            f" the work, and the states are worth nothing here.{rest}"
        )


def _dead(report: Report) -> Iterator[str]:
    aligned = report.get("alignment")
    if aligned:
        pairs = zip(aligned["layers"], aligned["state_share"], strict=True)
        # written so that NaN counts as dead
        dead = [layer for layer, share in pairs if share is not None and not share >= DEAD_SHARE]
        if dead:
            names = ", ".join(map(str, dead))
            yield f"The state of layer {names} is dead: less than {DEAD_SHARE:.0%} of the mixer's output depends on it."


def _retrieval(report: Report) -> Iterator[str]:
    rows = [*(report.get("retrieval") or []), *(report.get("tasks") or [])]
    rows = [r for r in rows if {"teacher", "hybrid"} <= r["models"].keys()]
    count = sum(r["probes"] for r in rows)
    if not count:
        return
    chance, taught, own = (
        sum(r["probes"] * value for r, value in zip(rows, values, strict=True)) / count
        for values in ([r["chance"] for r in rows], *([r["models"][n] for r in rows] for n in ("teacher", "hybrid")))
    )
    error = ERRORS * math.sqrt((taught * (1 - taught) + own * (1 - own)) / count)
    guess = ERRORS * math.sqrt(chance * (1 - chance) / count)
    if taught - chance > guess and taught - own > error and own - chance < KEPT_RETRIEVAL * (taught - chance):
        start = "Averages are fine, but retrieval is lost" if _fine(report) else "Retrieval is lost"
        yield f"{start}: {own:.0%} of {count} questions right, the teacher {taught:.0%}, guessing {chance:.0%}."


def _collapsed(report: Report) -> bool:
    models = (report.get("generation") or {}).get("models") or {}
    if not {"teacher", "hybrid"} <= models.keys():
        return False
    own, taught = (models[n]["repeated_4"] for n in ("hybrid", "teacher"))
    return own - taught > MORE_REPEATED and own > MUCH_REPEATED


def _collapse(report: Report) -> Iterator[str]:
    if _collapsed(report):
        own, taught = (report["generation"]["models"][n]["repeated_4"] for n in ("hybrid", "teacher"))
        yield f"Its answers run in circles: {own:.0%} of 4-grams were said before, of the teacher's {taught:.0%}."


def _generation(report: Report) -> Iterator[str]:
    models = (report.get("generation") or {}).get("models") or {}
    if not {"teacher", "hybrid"} <= models.keys() or not _fine(report):
        return
    own, taught = models["hybrid"], models["teacher"]
    reasons = ["runs in circles"] if _collapsed(report) else []
    if own["length"] < SHORT_ANSWER * taught["length"]:
        reasons.append(f"is {own['length']:.0f} tokens long, the teacher's {taught['length']:.0f}")
    if (
        None not in (own["teacher_nll"], taught["teacher_nll"])
        and own["teacher_nll"] - taught["teacher_nll"] > UNLIKELY
    ):
        reasons.append(f"costs the teacher {own['teacher_nll']:.2f} nats a token, its own {taught['teacher_nll']:.2f}")
    if reasons:
        yield f"Perplexity is fine, but what it writes {' and '.join(reasons)}."


def _hidden(report: Report) -> Iterator[str]:
    for what, models in _text(report, "teacher"):
        ratio, kl = _ratio(models), models["hybrid"]["kl"]
        if ratio <= FINE_RATIO and kl > max(LARGE_KL, HIDDEN * math.log(max(ratio, 1.0))):
            yield (
                f"On {what} perplexity is close ({ratio:.2f} x the teacher's) while KL is large ({kl:.3f} nats, top-1"
                f" {models['hybrid']['top1']:.0%}): it fits this text rather than the teacher."
            )


def _window(report: Report, name: str = "window", how: str = "an untrained window") -> Iterator[str]:
    tokens = (report.get("window_control") or {}).get("tokens")
    for what, models in _text(report, name):
        own, rival = models["hybrid"]["kl"], models[name]["kl"]
        # written so that NaN loses
        if not own <= rival:
            yield (
                f"On {what} {how} of {tokens} tokens{same_bytes(report)} is closer to the teacher"
                f" (KL {rival:.3f}) than the hybrid ({own:.3f})."
            )


def same_bytes(report: Report) -> str:
    """What the window control and the hybrid have in common, to follow a number of tokens."""
    context = (report.get("window_control") or {}).get("context")
    return " in the same bytes" if context is None else f" in the bytes that the hybrid holds after {context}"


def _trained_window(report: Report) -> Iterator[str]:
    yield from _window(report, "window_trained", "a window trained on the same text,")


def _placement(report: Report) -> Iterator[str]:
    for what, models in _text(report, "uniform"):
        own, rival = models["placed"]["kl"], models["uniform"]["kl"]
        # written so that NaN loses
        if not own <= rival:
            yield (
                f"On {what} as many layers spread evenly are closer to the teacher (KL {rival:.3f}) than those that"
                f" scores chose ({own:.3f}), both calibrated and untrained: the scores were not worth it."
            )


# name, what of the report it needs (`_measured`), rule
RULES: tuple[tuple[str, str, Callable[[Report], Iterator[str]]], ...] = (
    ("not-finite", "text", _not_finite),
    # what every evaluation writes: this rule is about the text that another may lack
    ("no-heldout-text", "window_control", _no_text),
    ("tokenizer-differs", "final", _tokenizer),
    ("states-idle", "work", _states),
    ("dead-state", "alignment", _dead),
    ("retrieval-lost", "retrieval", _retrieval),
    ("answer-collapse", "generation", _collapse),
    ("generation-bad", "generation", _generation),
    ("hidden-damage", "text", _hidden),
    ("worse-than-window", "text/window", _window),
    ("worse-than-trained-window", "text/window_trained", _trained_window),
    ("uniform-is-better", "text/uniform", _placement),
)
