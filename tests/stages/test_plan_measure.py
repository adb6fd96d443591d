"""`plan --measure`: what the table of features says, with weights and without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ssmorph import cli, verbs
from tests.families.tiny import family_config

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = str(CONFIGS / "tiny.yaml")
MOHAWK = str(CONFIGS / "study" / "mohawk.yaml")
WINDOWED = str(CONFIGS / "smollm2" / "135m-demo.yaml")


def costs(plan: dict[str, Any]) -> dict[str, Any]:
    return {row["feature"]: row["measured"] for row in plan["treatment"]}


def test_costs_are_measured_on_held_out_text_of_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", TINY, "--measure", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["measured_on"] == {"set": "python-reference", "windows": 2048 // 48, "window": 48}
    found = costs(plan)
    assert found["RoPE"]["worst_layer"] in (1, 3)
    assert 0 < found["RoPE"]["median"] <= found["RoPE"]["worst"]
    assert found["softmax"] == {"not_measured": "calibration reports its error"}
    assert found["MLPs"] is None


def test_the_table_shows_costs_where_they_are_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.run(["plan", TINY, "--measure"]) == 0
    shown = capsys.readouterr().out
    rope = next(line for line in shown.splitlines() if "RoPE" in line)
    assert "median 0." in rope
    assert "(layer " in rope
    assert "42 held-out windows of 48 tokens (python-reference)." in " ".join(shown.split())
    assert cli.run(["plan", TINY]) == 0
    assert "measured" not in capsys.readouterr().out


def test_a_teacher_without_weights_is_planned_and_named(tmp_path: Path) -> None:
    family_config("gemma2").save_pretrained(tmp_path)
    plan = verbs.plan(str(tmp_path), measure=True)
    assert plan["measured_on"] is None
    for feature in ("soft cap of scores", "RoPE"):
        assert "the weights must be whole" in costs(plan)[feature]["not_measured"]


def test_text_without_a_held_out_window_is_named() -> None:
    plan = verbs.plan(TINY, "data.window=200000", "data.max_tokens=null", measure=True)
    assert "data.window" in costs(plan)["RoPE"]["not_measured"]


def test_random_mixers_leave_nothing_to_measure() -> None:
    plan = verbs.plan(MOHAWK, "teacher.source=tiny-random-llama", "student.layers=all", measure=True)
    assert costs(plan)["attention"] == {"not_measured": "nothing of it is copied"}
    assert plan["measured_on"] is None


@pytest.mark.parametrize("mixer", ["windowed_mamba2", "window"])
def test_attention_that_stays_inside_a_window_has_no_cost_there(mixer: str) -> None:
    changes = (f"student.mixer={mixer}", "teacher.source=tiny-random-llama", "student.layers=all")
    found = costs(verbs.plan(WINDOWED, *changes, measure=True))
    assert found["attention inside the window"] is None
    assert found["attention behind the window"] == {"not_measured": "it is for evaluation to tell"}
    assert "RoPE" not in found
