"""docs/recipes.md lists every recipe as it loads, and the page that a row names for numbers has the recipe."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ssmorph.convert.plan import SCORED, UNSCORED, resolve_layers
from ssmorph.stages.config import (
    STAGES,
    DataConfig,
    EvaluateConfig,
    LogitsStage,
    OptimConfig,
    PlacementConfig,
    RunConfig,
    StageTeacher,
    StudentConfig,
    TeacherConfig,
)
from ssmorph.stages.recipe import build, load_recipe
from tests.stages.test_shipped_recipes import CONFIGS, MODELS, RECIPES, model_of

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


def row_of(recipe: Path) -> str:
    """What a recipe's row must begin with: all but where its numbers are."""
    config, name = load_recipe(recipe), recipe.relative_to(CONFIGS).as_posix()
    total = MODELS[model_of(recipe)].layers
    layers = f"{len(resolve_layers(config.student.layers, total))} of {total}"
    tokens = sum(getattr(stage, "tokens", 0) for stage in config.stages)
    link = f"[{name.removesuffix('.yaml')}](../configs/{name})"
    cells = (link, config.teacher.source, config.student.mixer, layers, f"{tokens:,}", config.device)
    return f"| {' | '.join(cells)} | "


def rows() -> list[str]:
    return [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| [")]


def test_every_recipe_has_its_row_and_no_other_has_one() -> None:
    starts = [line[: line.rindex(" | ") + 3] for line in rows()]
    assert starts == [row_of(recipe) for recipe in RECIPES]


def test_every_key_that_the_page_explains_is_one_of_a_recipe() -> None:
    text = PAGE.read_text(encoding="utf-8")
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.+?)```", text, re.DOTALL)]
    # `kind: {key: value}` in the table, optim being a key of any stage
    shown = [yaml.safe_load(cell) for cell in re.findall(r"^\| `(\w+: \{.+?\})` \|", text, re.MULTILINE)]
    stages = [stage for block in blocks for stage in block]
    stages += [{"kind": "logits", **e} if "optim" in e else {"kind": k, **v} for e in shown for k, v in e.items()]
    assert len(blocks) >= 2
    assert len(shown) >= 5
    for stage in stages:
        chain = [stage] if stage["kind"] == "surgery" else [{"kind": "surgery"}, stage]
        build({"teacher": {"source": "m"}, "run_dir": "r", "stages": chain})


def test_numbers_are_where_a_row_says() -> None:
    places = {line.split("](")[1].split(")")[0]: line.rsplit(" | ", 1)[1] for line in rows()}
    for recipe, place in places.items():
        link = re.search(r"\]\((.+)\)", place)
        if link is None:
            assert place == "none yet |", recipe
        else:
            assert Path(recipe).name in (PAGE.parent / link[1]).resolve().read_text(encoding="utf-8"), recipe
    assert len({place for place in places.values() if "](" in place}) >= 2


SECTIONS = {
    "student": StudentConfig, "placement": PlacementConfig, "teacher": TeacherConfig, "data": DataConfig,
    "optim": OptimConfig, "logits": LogitsStage, "evaluate": EvaluateConfig, "recipe": RunConfig,
}  # fmt: skip


@pytest.mark.parametrize("section", SECTIONS)
def test_the_keys_of_a_section_and_their_defaults_are_listed(section: str) -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = lines.index(f"| `{section}.` | default | is |") + 2
    table = [line.split(" | ")[:2] for line in itertools.takewhile(lambda text: text.startswith("| "), lines[start:])]
    listed: dict[str, str] = {}
    for names, values in table:
        keys, shown = re.findall(r"`(\w+)`", names), values.split(", ")
        listed |= dict(zip(keys, shown if values != "see above" else [values] * len(keys), strict=True))
    assert listed == {f.name: default_of(f) for f in dataclasses.fields(SECTIONS[section]) if not fixed(f)}


def fixed(field: dataclasses.Field[Any]) -> bool:
    """Whether it only says which stage this is."""
    return field.name == "kind" and field.default in STAGES


def default_of(field: dataclasses.Field[Any]) -> str:
    """A key's default as the page writes it."""
    if field.name in ("optim", "student", "placement", "data", "stages", "evaluate") or field.type == "TeacherConfig":
        return "see above"
    if field.default is dataclasses.MISSING:
        return "required"
    value = field.default
    if isinstance(value, tuple):
        shown = [v.source if isinstance(v, StageTeacher) else v for v in value]
        return f"[{'; '.join(map(str, shown))}]" if shown else "none"
    return "none" if value is None else str(value)


def test_every_strategy_is_listed() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert [name for name in UNSCORED + SCORED if f"`{name}`" not in page] == []
