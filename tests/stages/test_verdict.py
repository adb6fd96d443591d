"""The verdict: broken hybrids are called out by name through the evaluator, a healthy one is not; each rule alone."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ssmorph.convert.calibrate import CalibrationOptions, calibrate
from ssmorph.convert.families import family_of
from ssmorph.convert.tiny import byte_tokenizer
from ssmorph.stages.config import DataConfig
from ssmorph.stages.data import PackedData, open_or_pack
from ssmorph.stages.evaluate import evaluate
from ssmorph.stages.health import inspect_final
from ssmorph.stages.suite import Suite
from ssmorph.stages.verdict import RULES, unchecked, verdict
from tests.models import tiny_hybrid, tiny_teacher

SUITE = Suite(
    tokens=384, domain_tokens=96, lengths=(96,), retrieval_distances=(24,), retrieval_probes=2, decode_contexts=(64,),
    work_tokens=288, added=2, aligned_tokens=96, prompts=4, new_tokens=24,
    task_lengths=(48,), task_depths=(0.5,), task_probes=2, domain_controls=True,
)  # fmt: skip
BREAKS = ("states-idle", "dead-state", "tokenizer-differs", "answer-collapse", "not-finite")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PackedData:
    """Random letters: text on which a random teacher does not run in circles."""
    folder = tmp_path_factory.mktemp("text")
    letters = torch.randint(97, 123, (40, 600), generator=torch.Generator().manual_seed(0)).tolist()
    for i, row in enumerate(letters):
        (folder / f"{i:02}.txt").write_text("".join(map(chr, row)))
    config = DataConfig(sources=(str(folder),), window=96, heldout_percent=20)
    return open_or_pack(config, byte_tokenizer(), folder / "packed", lambda text: None)


def teacher() -> Any:
    # with an output layer of its own it writes something other than the last letter for ever
    return tiny_teacher(tie_word_embeddings=False)


def measured(data: PackedData, damage: Callable[[Any], None] = lambda hybrid: None) -> dict[str, Any]:
    taught = teacher()
    spec = family_of(taught.config)
    hybrid = tiny_hybrid(teacher=copy.deepcopy(taught))
    windows = [data.batch(0, step, 0, 1, 4, 96).tokens_BL for step in range(16)]
    calibrate(taught, hybrid, spec, windows, CalibrationOptions())
    with torch.no_grad():
        damage(hybrid)
    return evaluate(taught, hybrid, spec, data, byte_tokenizer(), SUITE, earlier=[("0-surgery", lambda: hybrid)])


def names(report: dict[str, Any]) -> set[str]:
    return {warning.name for warning in verdict(report)}


@pytest.fixture(scope="module")
def healthy(data: PackedData) -> dict[str, Any]:
    """A hybrid whose states matter, and whose tokenizer is the teacher's. Tests only read it."""
    return {**measured(data), "final": {"tokenizer_differences": []}}


def test_a_healthy_hybrid_raises_no_warning_of_breakage(healthy: dict[str, Any]) -> None:
    assert names(healthy) & set(BREAKS) == set()
    assert unchecked(healthy) == ["worse-than-trained-window", "uniform-is-better"]
    # the report is what report.json holds
    assert json.loads(json.dumps(healthy)) == healthy


def test_a_layer_whose_state_is_zeroed_is_named(data: PackedData) -> None:
    def damage(hybrid: Any) -> None:
        mixer = hybrid.mixers()[3]
        writes = slice(mixer.shape.inner, mixer.shape.inner + mixer.shape.groups * mixer.shape.state)
        mixer.conv1d.weight[writes] = 0
        mixer.conv1d.bias[writes] = 0

    found = [w for w in verdict(measured(data, damage)) if w.name == "dead-state"]
    assert len(found) == 1
    assert "layer 3 is dead" in found[0].text


def test_kept_attention_doing_all_the_work_is_called_out(data: PackedData) -> None:
    def damage(hybrid: Any) -> None:
        for mixer in hybrid.mixers().values():
            mixer.out_proj.weight.zero_()

    report = measured(data, damage)
    warnings = {w.name: w.text for w in verdict(report)}
    assert {"states-idle", "dead-state"} <= warnings.keys()
    assert "layer 1, 3 is dead" in warnings["dead-state"]
    assert "Narrowing the kept attention costs" in warnings["states-idle"]


def test_collapsed_generation_is_called_out(data: PackedData) -> None:
    def damage(hybrid: Any) -> None:
        head = hybrid.get_output_embeddings()
        head.bias = nn.Parameter(torch.zeros(head.weight.shape[0]))
        head.bias[65] = 1000.0

    report = measured(data, damage)
    assert report["generation"]["models"]["hybrid"]["repeated_4"] > 0.9
    assert "answer-collapse" in names(report)


def test_numbers_that_are_none_are_called_out(data: PackedData) -> None:
    def damage(hybrid: Any) -> None:
        hybrid.mixers()[1].D[0] = math.nan

    report = measured(data, damage)
    assert {"not-finite", "worse-than-window"} <= names(report)
    assert any("layers.1" in w.text for w in verdict(report))


def test_a_swapped_tokenizer_is_called_out(tmp_path: Path, healthy: dict[str, Any]) -> None:
    taught, own = byte_tokenizer(), byte_tokenizer()
    own.save_pretrained(tmp_path / "same")
    assert inspect_final(tmp_path / "same", taught) == {"tokenizer_differences": []}
    vocab = own.get_vocab()
    rules = json.loads(own.backend_tokenizer.to_str())
    rules["model"]["vocab"] = {**vocab, "a": vocab["b"], "b": vocab["a"]}
    (tmp_path / "same" / "tokenizer.json").write_text(json.dumps(rules))
    report = {**healthy, "final": inspect_final(tmp_path / "same", taught)}
    found = [w for w in verdict(report) if w.name == "tokenizer-differs"]
    assert len(found) == 1
    assert "vocabulary, tokens of a sample text" in found[0].text


def plain(**changes: Any) -> dict[str, Any]:
    """A report without blemish, by hand."""
    row = {"perplexity": 10.5, "kl": 0.05, "top1": 0.9}
    models = {"teacher": {"perplexity": 10.0, "kl": 0.0, "top1": 1.0}, "hybrid": row, "window": {**row, "kl": 0.1}}
    written = {"length": 40.0, "repeated_4": 0.1, "teacher_nll": 0.5}
    report = {
        "text": [{"set": "documents", "window": 512, "models": models}],
        "window_control": {"tokens": 109},
        "final": {"tokenizer_differences": []},
        "work": {"models": {"hybrid": row, "silenced": {**row, "kl": 3.0}}},
        "alignment": {"layers": [1], "state_share": [0.5]},
        "retrieval": [{"probes": 100, "chance": 0.25, "models": {"teacher": 0.9, "hybrid": 0.8}}],
        "generation": {"models": {"teacher": written, "hybrid": dict(written)}},
    }
    return copy.deepcopy({**report, **changes})


def with_hybrid(**row: float) -> dict[str, Any]:
    report = plain()
    report["text"][0]["models"]["hybrid"].update(row)
    return report


def idle(shares: list[float | None]) -> dict[str, Any]:
    report = plain(alignment={"layers": [1], "state_share": shares})
    report["work"]["models"]["silenced"] = dict(report["work"]["models"]["hybrid"])
    return report


def with_trained_window(kl: float) -> dict[str, Any]:
    report = plain()
    models = report["text"][0]["models"]
    models["window_trained"] = {**models["window"], "kl": kl}
    return report


def with_generation(**row: float) -> dict[str, Any]:
    report = plain()
    report["generation"]["models"]["hybrid"].update(row)
    return report


def with_retrieval(probes: int, taught: float, own: float) -> dict[str, Any]:
    models = {"teacher": taught, "hybrid": own}
    return plain(retrieval=[{"probes": probes, "chance": 0.25, "models": models}])


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (plain(), set()),
        (plain(unfilled=[2048]), set()),  # the run's own window was filled
        (plain(unfilled=[512], text=[]), {"no-heldout-text"}),
        (with_retrieval(100, 0.9, 0.3), {"retrieval-lost"}),
        (with_retrieval(4, 0.75, 0.5), set()),  # four questions say nothing
        (with_retrieval(100, 0.27, 0.2), set()),  # the teacher guesses too
        (with_hybrid(kl=0.4), {"hidden-damage", "worse-than-window"}),
        (with_hybrid(perplexity=14.0, kl=0.09), set()),
        (with_hybrid(perplexity=math.inf), {"not-finite"}),
        (with_hybrid(kl=0.15), {"worse-than-window"}),
        (with_trained_window(0.04), {"worse-than-trained-window"}),
        (with_trained_window(0.06), set()),
        (with_generation(repeated_4=0.8), {"answer-collapse", "generation-bad"}),
        (with_generation(teacher_nll=3.0), {"generation-bad"}),
        (with_generation(length=2.0), {"generation-bad"}),
        (plain(alignment={"layers": [1, 2], "state_share": [0.5, math.nan]}), {"dead-state"}),
        # every head kept: no state to be dead, and none in any layer to be idle
        (plain(alignment={"layers": [1, 2], "state_share": [0.5, None]}), set()),
        (idle([None]), set()),
        (idle([0.5]), {"states-idle"}),
    ],
)
def test_each_rule_alone(report: dict[str, Any], expected: set[str]) -> None:
    assert names(report) == expected


def test_lost_retrieval_says_that_averages_are_fine_only_where_they_are() -> None:
    lost = with_retrieval(100, 0.9, 0.3)
    assert verdict(lost)[0].text.startswith("Averages are fine, but retrieval is lost: 30% of 100")
    lost["text"][0]["models"]["hybrid"]["perplexity"] = 20.0
    assert verdict(lost)[0].text.startswith("Retrieval is lost")


def test_held_out_text_shorter_than_a_window_is_called_out(tmp_path: Path) -> None:
    (tmp_path / "short").mkdir()
    for i in range(40):
        (tmp_path / "short" / f"{i}.txt").write_text(f"{i} and {i * i}, {i**3}")
    config = DataConfig(sources=(str(tmp_path / "short"),), window=96)
    packed = open_or_pack(config, byte_tokenizer(), tmp_path / "packed", lambda text: None)
    taught, said = teacher(), list[str]()
    hybrid = tiny_hybrid(teacher=copy.deepcopy(taught))
    suite = dataclasses.replace(SUITE, lengths=(96, 256))
    report = evaluate(taught, hybrid, family_of(taught.config), packed, byte_tokenizer(), suite, say=said.append)
    assert "evaluate: held-out documents in windows of 96 left out, for no window is filled" in said
    assert report["text"] == []
    warnings = {w.name: w.text for w in verdict(report)}
    assert "No held-out text fills a window of 96 tokens" in warnings["no-heldout-text"]
    assert "no-heldout-text" not in unchecked(report)


def test_rules_without_their_measurement_are_named() -> None:
    assert unchecked({}) == [name for name, _, _ in RULES]
    rows = {"perplexity": 1.0, "kl": 0.0, "top1": 1.0}
    alone = {"text": [{"set": "s", "window": 8, "models": {"teacher": rows, "hybrid": rows}}]}
    assert {"worse-than-window", "worse-than-trained-window", "uniform-is-better"} <= set(unchecked(alone))
    assert verdict({}) == []
    report = plain()
    del report["generation"]
    # nor has this report trained windows or a scored placement
    assert unchecked(report) == ["answer-collapse", "generation-bad", "worse-than-trained-window", "uniform-is-better"]
