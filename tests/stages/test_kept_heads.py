"""Kept heads through recipe, plan and pipeline: listed, or found by the probe, which is asked once."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

import ssmorph.hf  # noqa: F401  registers the classes
from ssmorph import verbs
from ssmorph.convert.families import attention_shape, family_of
from ssmorph.convert.plan import foremost_heads, listed_heads, spread_heads
from ssmorph.convert.teachers import load_teacher
from ssmorph.convert.tiny import tiny_config
from ssmorph.errors import UserError
from ssmorph.stages import kept_heads
from ssmorph.stages.head_probe import far_importance
from ssmorph.stages.plan_table import print_plan
from ssmorph.stages.recipe import build, dump, load_recipe

from .tiny_run import RECIPE, run_tiny

MIXER = "student.mixer=mamba2_heads"
SHAPE = attention_shape(tiny_config())


def read(run: Path, name: str) -> dict[str, Any]:
    return json.loads((run / name).read_text())


def test_listed_heads_go_through_every_stage(tmp_path: Path) -> None:
    run = run_tiny(tmp_path / "run", MIXER, "student.heads=['3.5', '3.0']", "evaluate.suite=short")
    assert read(run, "plan.json") == {"layers": [1, 3], "mixer": "mamba2_heads", "heads": [[3, 0], [3, 5]]}
    assert read(run, "0-surgery/DONE")["summary"]["heads"] == [[3, 0], [3, 5]]
    model = AutoModelForCausalLM.from_pretrained(run / "final")
    assert {i: (m.kind, m.shape.kept) for i, m in model.mixers().items()} == {
        1: ("mamba2", ()), 3: ("mamba2_heads", (0, 5)),
    }  # fmt: skip
    # every head that became Mamba-2 is compared with the teacher's
    assert {i: len(errors) for i, errors in read(run, "report.json")["matrices"]["errors"].items()} == {"1": 6, "3": 4}
    said: list[str] = []
    run_tiny(run, MIXER, "student.heads=['3.5', '3.0']", "evaluate.suite=short", say=said.append)
    assert not any("starting" in line for line in said)


def test_the_probe_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = (MIXER, "student.heads=retrieval-3", "placement.probes=2")
    run = run_tiny(tmp_path / "run", *wanted, until="surgery")
    importance = read(run, "placement/heads.json")["importance"]
    best = sorted(((i, h) for i in (1, 3) for h in range(6)), key=lambda pair: -importance[pair[0]][pair[1]])[:3]
    assert read(run, "plan.json")["heads"] == [list(pair) for pair in sorted(best)]

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("asked again")

    with monkeypatch.context() as inside:
        inside.setattr(kept_heads, "head_importance", refuse)
        before = read(run, "plan.json")
        run_tiny(run, *wanted, until="surgery", start="surgery")
        assert read(run, "plan.json") == before
    with pytest.raises(UserError, match="does not change"):
        run_tiny(run, *wanted, "student.heads=retrieval-4", until="surgery")


def test_heads_beside_a_window_are_those_that_bring_most_from_behind_it(tmp_path: Path) -> None:
    def windowed(name: str, *overrides: str, until: str | None = None) -> Path:
        changes = ("student.mixer=windowed_mamba2", "student.window=12", "student.sinks=2", "student.state=8",
                   "stages=[{kind: surgery}, {kind: calibrate, tokens: 384}]", "placement.probes=2")  # fmt: skip
        return verbs.convert(
            RECIPE, *changes, *overrides, run_dir=str(tmp_path / name), until=until, say=lambda _line: None
        )

    run, plain = windowed("run", "student.heads=retrieval-1"), windowed("plain")
    teacher, tokenizer = load_teacher("tiny-random-llama")
    importance = far_importance(teacher, family_of(teacher.config), tokenizer, 12, 2, seed=0, probes=2)
    assert read(run, "placement/heads.json")["importance"] == importance.tolist()
    layer, head = max(((i, h) for i in (1, 3) for h in range(6)), key=lambda pair: float(importance[pair]))
    first = head // 3 * 3
    assert read(run, "plan.json")["heads"] == [[layer, first], [layer, first + 1], [layer, first + 2]]
    assert "3 heads of converted layers stay attention" in (run / "final/README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(run / "final")
    expected = {layer: (first, first + 1, first + 2), 4 - layer: ()}
    assert {i: m.shape.kept for i, m in model.mixers().items()} == expected
    # 12 tokens and 8 prototypes of 9 floats are 16.5 tokens of four key/value heads each; one has all 48 instead
    tokens = [read(r, "report.json")["window_control"]["tokens"] for r in (plain, run)]
    assert tokens == [16, (3 * 16.5 + 48) // 4]
    # a copy keeps the heads whole, which the window alone does not
    rows = [read(r, "report.json")["text"][0]["models"] for r in (plain, run)]
    assert [(name in models) for models in rows for name in ("copy", "own_window")] == [False, True, True, True]
    assert rows[1]["copy"]["kl"] < rows[1]["own_window"]["kl"]
    # behind another window other heads matter
    other = windowed("other", "student.heads=retrieval-1", "student.window=8", until="surgery")
    assert read(other, "placement/heads.json")["importance"] != importance.tolist()


def test_all_of_no_heads_is_mamba2(tmp_path: Path) -> None:
    run = run_tiny(tmp_path / "run", MIXER, "student.heads=retrieval-0", until="surgery")
    plain = run_tiny(tmp_path / "plain", until="surgery")
    one, other = ((r / "0-surgery/student/student.safetensors").read_bytes() for r in (run, plain))
    assert one == other


def test_foremost_are_of_converted_layers_alone() -> None:
    importance = [[9.0, 9.0], [1.0, 3.0], [8.0, 8.0], [2.0, 3.0]]
    assert foremost_heads(importance, (1, 3), 3) == ((1, 1), (3, 0), (3, 1))
    assert foremost_heads(importance, (1, 3), 0) == ()
    assert listed_heads(("3.1", "1.0"), (1, 3), 2) == ((1, 0), (3, 1))
    # over layers first, then over key/value heads
    assert spread_heads(4, (1, 3), SHAPE) == ((1, 0), (1, 3), (3, 0), (3, 3))


def test_the_plan_counts_what_kept_heads_cache(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    plan = verbs.plan(str(RECIPE), MIXER, "student.heads=['3.0', '3.1']")
    one, three = plan["layers"][1], plan["layers"][3]
    assert (one["becomes"], three["becomes"], three["kept_heads"]) == ("mamba2", "mamba2_heads", [0, 1])
    # one key/value head of two, width 8, float32; four heads with a state of 8 x 8
    assert (one["cache_bytes_per_token"], three["cache_bytes_per_token"]) == (0, 2 * 8 * 4)
    assert three["cache_bytes_fixed"] == 4 * 8 * 8 * 4 + 3 * 4 * 24 * 4
    assert plan["never_smaller"] == []
    assert plan["smaller_from_tokens"] == -(-three["cache_bytes_fixed"] // 64)
    assert {row["feature"]: row["treatment"] for row in plan["treatment"]}["kept heads"] == "exact"
    print_plan(plan)
    assert "keeps 0, 1" in capsys.readouterr().out
    both = verbs.plan(str(RECIPE), MIXER, "student.heads=retrieval-4")
    assert both["never_smaller"] == [1, 3]
    print_plan(both)
    assert "retrieval-4" in capsys.readouterr().out


def test_the_plan_knows_heads_beside_a_window(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    stages = "stages=[{kind: surgery}]"
    windowed = ("student.mixer=windowed_mamba2", "student.window=12", "student.sinks=2", "student.state=8", stages)
    plan = verbs.plan(str(RECIPE), *windowed, "student.heads=['3.4']")
    one, three = plan["layers"][1], plan["layers"][3]
    assert (one["kept_heads"], three["kept_heads"]) == ([], [3, 4, 5])
    assert (one["cache_bytes_per_token"], three["cache_bytes_per_token"]) == (0, 2 * 8 * 4)
    # one of two key/value heads has a window and a state
    assert one["cache_bytes_fixed"] == 2 * three["cache_bytes_fixed"] == 2 * (2 * 12 * 8 + 9 * 8) * 4
    assert one["parameters"] > three["parameters"]
    assert {row["feature"]: row["treatment"] for row in plan["treatment"]}["kept heads"] == "exact"
    print_plan(plan)
    assert "keeps 3, 4, 5" in " ".join(capsys.readouterr().out.split())


def test_a_budget_of_bytes_leaves_room_for_kept_heads() -> None:
    # a layer of attention: 2 key/value heads, width 8, keys and values, float32, 4096 tokens
    layer = 2 * 2 * 8 * 4 * 4096 / 2**20
    budget = ("student.layers=loo", f"placement.cache_mib={2.2 * layer}")
    assert len(verbs.plan(str(RECIPE), *budget)["converted"]) == 2
    # one head takes half a layer
    plan = verbs.plan(str(RECIPE), *budget, MIXER, "student.heads=retrieval-1")
    assert len(plan["converted"]) == 3
    held = sum(row["cache_bytes_fixed"] + 4096 * row["cache_bytes_per_token"] for row in plan["layers"])
    assert held <= 2.2 * layer * 2**20


def test_a_list_survives_the_saved_recipe() -> None:
    config = load_recipe(RECIPE, [MIXER, "student.heads=['3.10', '1.0']", "stages=[{kind: surgery}]"])
    assert build(yaml.safe_load(dump(config))) == config


HEADS = {"mixer": "mamba2_heads", "layers": [1, 3]}


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"student": HEADS}, "mamba2_heads needs heads to keep"),
        ({"student": {"heads": ["1.0"]}}, "student.heads: needs a mixer of mamba2_heads"),
        ({"student": {**HEADS, "heads": [1.0]}}, "student.heads[0]: must be text"),
        ({"student": {**HEADS, "heads": ["1.0", "1.0"]}}, "distinct 'LAYER.HEAD'"),
        ({"student": {**HEADS, "heads": ["1"]}}, "distinct 'LAYER.HEAD'"),
        ({"student": {**HEADS, "heads": "best-3"}}, "or 'retrieval-N'"),
        ({"student": {**HEADS, "layers": "loo-2", "heads": ["1.0"]}}, "known before scores"),
        ({"student": {**HEADS, "heads": "retrieval-3"}, "stages": [{"kind": "surgery", "init": "random"}]},
         "kept heads are the attention's own copy"),
        ({"student": {**HEADS, "heads": "retrieval-3"},
          "stages": [{"kind": "surgery"}, {"kind": "mixing", "loss": "frobenius"}]}, "frobenius"),
    ],
)  # fmt: skip
def test_recipes_that_cannot_be(change: dict[str, Any], rule: str) -> None:
    whole = {"teacher": {"source": "x"}, "run_dir": "runs/x", "stages": [{"kind": "surgery"}], **change}
    with pytest.raises(UserError, match=re.escape(rule)):
        build(whole)


@pytest.mark.parametrize(
    ("heads", "rule"),
    [
        ("['2.0']", "a kept head is in a converted layer, of 1, 3"),
        ("['3.6']", "a head must be in 0..5"),
        ("retrieval-13", "2 converted layers have 12 heads"),
    ],
)
def test_heads_that_are_not_there(tmp_path: Path, heads: str, rule: str) -> None:
    for work in (verbs.plan, lambda *a: run_tiny(tmp_path / "run", *a[1:])):
        with pytest.raises(UserError, match=re.escape(rule)):
            work(str(RECIPE), MIXER, f"student.heads={heads}")
    assert not (tmp_path / "run").exists()


def test_a_layer_of_kept_heads_alone_has_nothing_to_align(tmp_path: Path) -> None:
    every = "student.heads=" + str([f"3.{h}" for h in range(6)])
    with pytest.raises(UserError, match="mixing aligns the heads that are not kept"):
        run_tiny(tmp_path / "run", MIXER, "student.layers=[3]", every)
