"""Scored placements through the pipeline: what scores mean, that they are kept, resumed and reused, and the control."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from ssmorph import verbs
from ssmorph.convert.families import family_of
from ssmorph.convert.teachers import load_teacher
from ssmorph.errors import UserError
from ssmorph.stages import placement, placement_gates
from ssmorph.stages.head_probe import far_importance
from ssmorph.stages.placement_gates import blended, on_budget
from ssmorph.stages.recipe import load_recipe
from ssmorph.stages.scores import Candidate, score
from ssmorph.stages.verdict import verdict
from tests.models import tiny_hybrid, tiny_teacher

from .tiny_run import RECIPE, in_child, run_tiny

SMALL = ("placement.calibration_tokens=384", "placement.score_tokens=96", "placement.train_tokens=96",
         "placement.probes=2")  # fmt: skip
NAMES = ("loo", "kl", "retrieval", "gates")


def placed(folder: Path, layers: str, *overrides: str, **options: Any) -> Path:
    """A run up to surgery."""
    return run_tiny(folder, f"student.layers={layers}", *SMALL, *overrides, **{"until": "surgery", **options})


def read(run: Path, name: str) -> dict[str, Any]:
    return json.loads((run / name).read_text())


@pytest.mark.parametrize("name", NAMES)
def test_layers_of_lowest_score_are_converted_and_scores_reused(tmp_path: Path, name: str) -> None:
    run = placed(tmp_path / "run", f"{name}-2")
    found, plan = read(run, f"placement/{name}.json"), read(run, "plan.json")
    scores = found["scores"]
    assert found["done"]
    assert len(set(scores)) == 4
    assert plan["layers"] == sorted(sorted(range(4), key=scores.__getitem__)[:2])
    assert (plan["placement"], plan["scores"]) == (f"{name}-2", scores)
    assert read(run, "0-surgery/DONE")["summary"]["layers"] == plan["layers"]
    assert [p.name for p in (run / "placement").iterdir()] == [f"{name}.json"]
    said: list[str] = []
    placed(run, f"{name}-2", start="surgery", say=said.append)
    assert not any("scoring" in line for line in said)


def test_a_score_is_of_one_layer_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[int]]] = []
    original = placement.Scoring._divergence

    def spied(self: Any, student: Any, attending: list[int]) -> float:
        assert sorted(student.mixers()) == [0, 1, 2, 3]
        asked.append((self.name, attending))
        return original(self, student, attending)

    monkeypatch.setattr(placement.Scoring, "_divergence", spied)
    run = placed(tmp_path / "loo", "loo-1")
    assert asked == [("loo", [j for j in range(4) if j != i]) for i in range(4)]
    assert all(value > 0 for value in read(run, "placement/loo.json")["scores"])
    asked.clear()
    run = placed(tmp_path / "kl", "kl-1", "placement.train_tokens=0")
    assert asked == [("kl", []), *(("kl", [i]) for i in range(4))]
    whole = read(run, "placement/kl.json")
    assert all(value < whole["whole"] for value in whole["scores"])


def test_text_that_scores_was_not_calibrated_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[int, int]] = []
    original = placement.Context.batch
    monkeypatch.setattr(
        placement.Context, "batch", lambda self, *a: (steps.append((a[0], a[1])), original(self, *a))[1]
    )
    placed(tmp_path / "run", "loo-1")
    # 384 tokens of calibration are 4 batches of 2 windows of 48
    assert set(steps) == {(1, 0), (1, 1), (1, 2), (1, 3), (1, 4)}
    assert steps.count((1, 0)) == 1
    assert steps.count((1, 4)) == 4


@pytest.mark.parametrize(("name", "place"), [("loo", "_divergence"), ("gates", "_loss")])
def test_a_killed_scoring_goes_on_where_it_stopped(tmp_path: Path, name: str, place: str) -> None:
    owner: Any = placement.Scoring if name == "loo" else placement_gates
    original, calls, train = getattr(owner, place), [0], "placement.train_tokens=192"

    def killing(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)

    def run() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, place, killing)
            placed(tmp_path / "run", f"{name}-2", train)

    assert in_child(run) == -signal.SIGKILL
    half = read(tmp_path / "run", f"placement/{name}.json")
    assert not half["done"]
    assert half["state"]["step"] == 2 if name == "gates" else sum(v is not None for v in half["scores"]) == 2
    count = [0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, place, lambda *args: (count.__setitem__(0, count[0] + 1), original(*args))[1])
        placed(tmp_path / "run", f"{name}-2", train)
    assert count == [2]
    whole = placed(tmp_path / "whole", f"{name}-2", train)
    assert read(tmp_path / "run", f"placement/{name}.json") == read(whole, f"placement/{name}.json")


def test_scores_of_another_recipe_are_not_reused(tmp_path: Path) -> None:
    run = placed(tmp_path / "run", "retrieval-2")
    before = read(run, "placement/retrieval.json")
    placed(run, "retrieval-3", start="surgery")
    assert read(run, "placement/retrieval.json") == before
    assert len(read(run, "plan.json")["layers"]) == 3
    placed(run, "retrieval-3", "placement.probes=3", start="surgery")
    assert read(run, "placement/retrieval.json")["heads"] != before["heads"]


def test_retrieval_keeps_layers_that_see_behind_the_window_where_others_have_one(tmp_path: Path) -> None:
    mixer = ("student.mixer=windowed_mamba2", "student.window=12", "student.sinks=2", "stages=[{kind: surgery}]")
    run = verbs.convert(RECIPE, *SMALL, *mixer, "student.layers=retrieval-2", "evaluate.suite=none",
                        run_dir=str(tmp_path / "run"), say=lambda line: None)  # fmt: skip
    teacher, tokenizer = load_teacher("tiny-random-llama")
    probes = load_recipe(RECIPE, list(SMALL)).placement.probes
    heads = far_importance(teacher, family_of(teacher.config), tokenizer, 12, 2, seed=0, probes=probes)
    assert read(run, "placement/retrieval.json")["heads"] == heads.tolist()


def test_smart_spreads_by_the_scores_of_loo(tmp_path: Path) -> None:
    run = placed(tmp_path / "run", "smart-2")
    scores = read(run, "placement/loo.json")["scores"]
    assert read(run, "plan.json") == {
        "layers": list(placement.spread_lowest(scores, 2)), "mixer": "mamba2", "placement": "smart-2", "scores": scores,
    }  # fmt: skip


def test_a_budget_of_bytes_decides_how_many(tmp_path: Path) -> None:
    # 16 kv channels in float32: 128 bytes a token and layer, 512 KiB in all at 1024 tokens
    budget = ("placement.context=1024", "placement.cache_mib=0.3")
    run = placed(tmp_path / "run", "retrieval", *budget)
    scores = read(run, "placement/retrieval.json")["scores"]
    assert read(run, "plan.json")["layers"] == sorted(sorted(range(4), key=scores.__getitem__)[:2])
    plan = verbs.plan(str(RECIPE), "student.layers=retrieval", *budget)
    assert (len(plan["converted"]), plan["placement"]) == (2, "retrieval")
    with pytest.raises(UserError, match=r"placement\.cache_mib: the smallest cache takes"):
        placed(tmp_path / "other", "retrieval", "placement.context=1024", "placement.cache_mib=0.001")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["student.layers=loo"], r"student\.layers: needs K, or placement\.cache_mib instead; got loo"),
        (["student.layers=loo-2", "placement.cache_mib=1"], r"placement\.cache_mib: decides in place of the K"),
        (["student.layers=smart", "placement.cache_mib=1"], r"student\.layers: smart needs K"),
        (["student.layers=gates-2", "placement.train_tokens=0"], r"placement\.train_tokens: gates are trained"),
        (
            ["student.layers=best-2"],
            r"student\.layers: must be a list of layers, 'all' or NAME-K .*loo.*; got 'best-2'",
        ),
        (["placement.probes=0"], r"placement\.probes: must be positive; got 0"),
    ],
)
def test_mistakes_in_a_recipe(overrides: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_recipe(RECIPE, overrides)


def test_the_evaluation_has_the_uniform_control(tmp_path: Path) -> None:
    run = placed(tmp_path / "run", "retrieval-2", "evaluate.suite=short", "evaluate.tokens=96", until=None)
    report = read(run, "report.json")
    models = report["text"][0]["models"]
    assert {"placed", "uniform"} <= models.keys()
    assert models["placed"]["kl"] != models["uniform"]["kl"]
    assert [p.name for p in (run / "placement").iterdir()] == ["retrieval.json"]
    assert "uniform placement, calibrated" in (run / "final" / "README.md").read_text()
    for better, worse in (("placed", "uniform"), ("uniform", "placed")):
        models[better]["kl"], models[worse]["kl"] = 0.1, 0.2
        named = [w.text for w in verdict({"text": report["text"][:1]}) if w.name == "uniform-is-better"]
        assert len(named) == (better == "uniform")
    shutil.rmtree(run / "placement")
    again = verbs.evaluate_run(run, "short", 96, say=lambda text: None)
    assert again["text"][0]["models"]["uniform"] == read(run, "report.json")["text"][0]["models"]["uniform"]


def test_the_budget_of_gates_is_kept_and_has_its_gradient() -> None:
    logits = torch.tensor([-3.0, 0.5, 2.0, 9.0], dtype=torch.float64, requires_grad=True)
    assert on_budget(logits, 1.5).sum().item() == pytest.approx(1.5)
    assert torch.equal(on_budget(logits, 1.5).argsort(), logits.argsort())
    assert torch.autograd.gradcheck(lambda a: on_budget(a, 1.5), logits)
    torch.testing.assert_close(on_budget(torch.zeros(5), 2.0), torch.full((5,), 0.4))


@torch.no_grad()
def test_gates_blend_attention_and_mixer() -> None:
    teacher = tiny_teacher()
    hybrid = tiny_hybrid(layers=(0, 1, 2, 3), teacher=teacher)
    tokens = torch.randint(0, 256, (1, 20), generator=torch.Generator().manual_seed(0))
    spec = placement_gates.FamilySpec(model_types=("llama",))
    own, taught = hybrid(tokens).logits, teacher(tokens).logits
    seen = []
    for gate in (0.0, 0.5, 1.0):
        with blended(hybrid, teacher, spec, torch.full((4,), gate)):
            seen.append(hybrid(tokens, use_cache=False).logits)
    torch.testing.assert_close(seen[0], own)
    torch.testing.assert_close(seen[2], taught)
    assert not torch.allclose(seen[1], own, atol=0.1)
    assert not torch.allclose(seen[1], taught, atol=0.1)
    assert torch.equal(hybrid(tokens).logits, own)
    scored = score(teacher, [Candidate("same", teacher)], tokens)
    assert scored["same"].summary()["kl"] == 0


def test_gates_open_where_attention_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that layer 2 alone can lower opens its gate, and the others give way to the budget."""
    monkeypatch.setattr(placement_gates, "_loss", lambda ctx, gates, step: -gates[2])
    run = placed(tmp_path / "run", "gates-3", "placement.train_tokens=960")
    scores = read(run, "placement/gates.json")["scores"]
    assert scores[2] > 0.8
    assert max(scores[:2] + scores[3:]) < 0.25
    assert read(run, "plan.json")["layers"] == [0, 1, 3]
