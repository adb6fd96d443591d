"""A budget of tokens is shared out as a recipe's stages share theirs, in whole steps, and never exceeded."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssmorph.errors import UserError
from ssmorph.stages.config import RunConfig
from ssmorph.stages.recipe import dump, load_recipe

HEAD = "teacher: {source: m}\nrun_dir: r\ndata: {window: 100}\n"
THREE = """
stages:
  - {kind: surgery}
  - {kind: mixing, tokens: 80, batch: 1}
  - {kind: hidden, tokens: 160, batch: 1}
  - {kind: logits, tokens: 2760, batch: 1}
"""
FITTED = "stages: [{kind: surgery}, {kind: calibrate, tokens: 1600}, {kind: logits, tokens: 3200, batch: 1}]"


def tokens(folder: Path, stages: str, *overrides: str) -> list[int]:
    return [getattr(s, "tokens", 0) for s in load(folder, stages, *overrides).stages][1:]


def load(folder: Path, stages: str, *overrides: str) -> RunConfig:
    (folder / "recipe.yaml").write_text(HEAD + stages)
    return load_recipe(folder / "recipe.yaml", overrides)


@pytest.mark.parametrize(
    ("stages", "budget", "expected"),
    [
        (THREE, 30_000, [800, 1600, 27_600]),
        (THREE, 3_000, [100, 200, 2_700]),
        (THREE, 399, [100, 100, 100]),
        (THREE.replace("2760", "80"), 499, [100, 200, 100]),
        (THREE.replace("160", "2000").replace("2760", "80"), 400, [100, 200, 100]),
        (FITTED, 3_050, [1_000, 2_000]),
        (FITTED, 500, [400, 100]),
    ],
)
def test_stages_keep_their_shares_in_whole_steps(tmp_path: Path, stages: str, budget: int, expected: list[int]) -> None:
    found = tokens(tmp_path, stages, f"budget={budget}")
    assert found == expected
    assert sum(found) <= budget


def test_without_a_budget_tokens_stay_and_with_one_they_are_what_is_saved(tmp_path: Path) -> None:
    assert tokens(tmp_path, THREE) == [80, 160, 2760]
    config = load(tmp_path, THREE, "budget=30000")
    (tmp_path / "saved.yaml").write_text(dump(config))
    assert load_recipe(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(
    ("stages", "budget", "words"),
    [
        (THREE, "299", "every stage needs a step, 300 tokens together; got 299"),
        (FITTED, "400", "500 tokens together"),
        ("stages: [{kind: surgery}]", "400", "needs a stage that reads tokens"),
        (THREE, "1e4", "budget: must be a whole number"),
    ],
)
def test_budgets_that_cannot_be_kept_are_refused(tmp_path: Path, stages: str, budget: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load(tmp_path, stages, f"budget={budget}")
