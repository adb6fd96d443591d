"""Every recipe, planned offline against its model's stored config.

tests/data/configs holds the facts of each config.json that decide a plan, in the hub's own words; weights take no part.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ssmorph.convert.plan import resolve_layers
from ssmorph.errors import UserError
from ssmorph.stages import planning
from ssmorph.stages.config import CalibrateStage, LogitsStage, RunConfig, TrainStage
from ssmorph.stages.plan_table import print_plan
from ssmorph.stages.planning import plan_of
from ssmorph.stages.recipe import load_recipe

CONFIGS = Path(__file__).parents[2] / "configs"
STORED = Path(__file__).parents[1] / "data" / "configs"
COMMON = sorted((CONFIGS / "common").glob("*.yaml"))
NAMED = sorted(p for p in CONFIGS.rglob("*.yaml") if p not in COMMON)
# an alias is a 4-bit GGUF of the same model, dequantised: same config, other weights
ALIASES = {"smollm2-135m": "SmolLM2-135M", "gemma3-270m": "gemma-3-270m"}
# configs/tiny.yaml converts a model that is made on the spot; tests/e2e runs it whole
RECIPES = [p for p in NAMED if p.name != "tiny.yaml"]


class Expected(NamedTuple):
    """What a plan must find in a stored config, told apart from it: layers, parameters in millions, and features."""

    family: str
    layers: int
    millions: float
    features: frozenset[str] = frozenset()


GROUPED = frozenset({"grouped heads"})
NORMED = frozenset({"norm of queries and keys"})
QKV = frozenset({"q/k/v biases"})
BIASED = QKV | {"output bias"}
WINDOW = frozenset({"sliding window"})
SOMETIMES = GROUPED | NORMED | BIASED | WINDOW

# totals as the model cards and papers round them; the hub shows the same
MODELS = {
    "Llama-3.2-1B": Expected("llama", 16, 1236, GROUPED),
    "Llama-3.2-3B": Expected("llama", 28, 3213, GROUPED),
    "Llama-3.1-8B": Expected("llama", 32, 8030, GROUPED),
    "Qwen2.5-0.5B": Expected("qwen2", 24, 494, GROUPED | QKV),
    "Qwen2.5-1.5B": Expected("qwen2", 28, 1544, GROUPED | QKV),
    "Qwen2.5-7B": Expected("qwen2", 28, 7616, GROUPED | QKV),
    "Qwen3-0.6B": Expected("qwen3", 28, 596, GROUPED | NORMED),
    "Qwen3-8B": Expected("qwen3", 36, 8191, GROUPED | NORMED),
    "gemma-3-270m": Expected("gemma3_text", 18, 268, GROUPED | NORMED | WINDOW),
    "gemma-3-1b-pt": Expected("gemma3_text", 26, 1000, GROUPED | NORMED | WINDOW),
    "Mistral-7B-v0.3": Expected("mistral", 32, 7248, GROUPED),
    "OLMo-2-0425-1B": Expected("olmo2", 16, 1485, NORMED),
    "SmolLM2-135M": Expected("llama", 30, 134.5, GROUPED),
    "SmolLM2-360M": Expected("llama", 32, 362, GROUPED),
    "SmolLM2-1.7B": Expected("llama", 24, 1711),
    "phi-1_5": Expected("phi", 24, 1418, BIASED),
    "phi-2": Expected("phi", 32, 2780, BIASED),
    "pythia-410m": Expected("gpt_neox", 24, 405, BIASED),
}


@pytest.fixture(autouse=True)
def _no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_matmul_speed", lambda: 1e12)


def model_of(recipe: Path) -> str:
    """The stored config that a recipe's teacher has."""
    source = load_recipe(recipe).teacher.source
    return ALIASES[source] if source in ALIASES else source.split("/")[1]


def plan(recipe: Path, *overrides: str) -> tuple[str, RunConfig, dict[str, Any]]:
    """The model's name, and recipe and plan with the folder of its stored config for a teacher."""
    name = model_of(recipe)
    config = load_recipe(recipe, [f"teacher.source={STORED / name}", *overrides])
    return name, config, plan_of(config)


def test_every_stored_config_has_its_facts_and_a_recipe() -> None:
    stored = {path.parent.name for path in STORED.glob("*/config.json")}
    assert stored == MODELS.keys()
    assert {model_of(recipe) for recipe in RECIPES} == stored


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.relative_to(CONFIGS).as_posix())
def test_recipes_are_planned_against_stored_configs(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, config, found = plan(recipe)
    model = MODELS[name]
    assert (found["family"], len(found["layers"])) == (model.family, model.layers)
    assert found["converted"] == list(resolve_layers(config.student.layers, model.layers))
    assert 0 < len(found["converted"]) <= model.layers
    becomes = [row["layer"] for row in found["layers"] if row["becomes"] == config.student.mixer]
    assert becomes == found["converted"]
    treatment = {row["feature"]: row["treatment"] for row in found["treatment"]}
    if getattr(config.stages[0], "init", None) == "random":
        assert treatment["attention"] == "dropped"
        assert not treatment.keys() & (SOMETIMES | {"RoPE", "attention scale"})
    elif config.student.mixer == "windowed_mamba2":
        assert treatment["attention behind the window"] == "approximated"
        assert not treatment.keys() & (SOMETIMES | {"RoPE", "softmax"})
    else:
        assert treatment.keys() & SOMETIMES == model.features
        assert treatment["RoPE"] == treatment["softmax"] == "dropped"
        assert treatment["attention scale"] == ("exact" if config.student.mixer == "discrete_mamba2" else "dropped")
    assert json.loads(json.dumps(found)) == found
    print_plan(found)
    assert "sliding window" in capsys.readouterr().out or "sliding window" not in treatment


@pytest.mark.parametrize("name", MODELS)
def test_stored_configs_give_the_models_known_sizes(name: str) -> None:
    _, _, found = plan(next(p for p in RECIPES if model_of(p) == name))
    assert found["teacher_parameters"] / 1e6 == pytest.approx(MODELS[name].millions, rel=0.001)
    assert found["parameters"] - found["teacher_parameters"] == found["parameters_added"]


def test_no_minutes_are_told_for_a_card(capsys: pytest.CaptureFixture[str]) -> None:
    _, config, found = plan(CONFIGS / "llama" / "3.2-1b-one-gpu.yaml")
    assert config.device == "cuda"
    estimate = found["estimate"]
    assert (estimate["minutes"], estimate["matmul_gflops"]) == (None, None)
    # 8 operations for every parameter that multiplies and every token of distillation, to the norms' parameters
    logits = next(stage for name, stage in estimate["stages"].items() if name.endswith("logits"))
    assert logits["pflop"] == pytest.approx(8 * 1235.8e6 * logits["tokens"] / 1e15, rel=0.005)
    print_plan(found)
    text = " ".join(capsys.readouterr().out.split())
    assert "Their time on cuda is not known: no card was measured" in text
    assert "min here" not in text
    assert "CPU" not in text


def test_mohawks_hybrid_keeps_the_papers_four_layers() -> None:
    _, config, found = plan(CONFIGS / "phi" / "phi-1.5-mohawk-hybrid.yaml")
    assert sorted(set(range(24)) - set(found["converted"])) == [4, 10, 16, 22]
    tokens = [stage["tokens"] for stage in found["estimate"]["stages"].values()]
    assert tokens == [0, 80_000_000, 160_000_000, 4_760_000_000]
    assert sum(tokens) == 5_000_000_000
    whole = load_recipe(CONFIGS / "phi" / "phi-1.5-mohawk.yaml")
    assert [getattr(stage, "tokens", 0) for stage in whole.stages] == [0, 80_000_000, 160_000_000, 2_760_000_000]
    assert isinstance(config.stages[-1], LogitsStage)
    assert isinstance(whole.stages[-1], LogitsStage)
    assert replace(config.stages[-1], tokens=1) == replace(whole.stages[-1], tokens=1)
    assert config.stages[:-1] == whole.stages[:-1]
    assert [getattr(stage, "loss", None) for stage in config.stages] == [None, "frobenius", "l2", "kl"]


def test_windows_bound_the_cache_of_layers_that_slide() -> None:
    _, _, found = plan(CONFIGS / "gemma3" / "270m-laptop.yaml", "student.layers=[0, 5]")
    tokens = [row["cache_tokens"] for row in found["layers"]]
    assert [i for i, seen in enumerate(tokens) if seen is None] == [0, 5, 11, 17]
    assert {seen for seen in tokens if seen is not None} == {512}
    # 4 heads of 256 x 256 numbers, against 512 tokens of one key and one value of 256
    assert found["smaller_from_tokens"] > 512
    assert found["never_smaller"] == [0]


@pytest.mark.parametrize("base", COMMON, ids=lambda p: p.stem)
def test_shared_parts_are_no_recipes_and_are_used(base: Path) -> None:
    with pytest.raises(UserError, match="teacher: is required"):
        load_recipe(base)
    assert any(f"base: ../common/{base.name}" in recipe.read_text(encoding="utf-8") for recipe in NAMED)


def test_recipes_for_one_gpu_fit_one_of_80_gb() -> None:
    cards = [
        p for p in RECIPES if p.stem.endswith("-one-gpu") or p.parent.name == "phi" or p.stem == "3.2-3b-mambainllama"
    ]
    assert all(load_recipe(p).device == ("cuda" if p in cards else "cpu") for p in RECIPES)
    for recipe in cards:
        _, _, found = plan(recipe)
        assert found["estimate"]["memory_gib"] < 72, recipe.name


def test_memory_grows_with_the_batch_and_with_what_is_trained() -> None:
    recipe = CONFIGS / "smollm2" / "360m-laptop.yaml"
    logits = "stages.logits."
    changes = ("", f"{logits}gradient_checkpointing=true", f"{logits}batch=4", f"{logits}optim.rest_lr=1e-4")
    plans = [plan(recipe, *[change for change in (change,) if change])[2] for change in changes]
    once, checkpointed, batched, whole = (found["estimate"]["memory_gib"] for found in plans)
    assert checkpointed <= once < batched
    assert whole > once + 4


def test_laptop_recipes_need_no_gpu_and_fit() -> None:
    laptop = [p for p in RECIPES if p.stem.endswith("-laptop")]
    assert len(laptop) == 6
    for recipe in laptop:
        _, config, found = plan(recipe)
        assert config.device == "cpu"
        assert found["estimate"]["memory_gib"] < 8


STUDY = sorted((CONFIGS / "study").glob("*.yaml"))


def test_the_studys_recipes_differ_in_method_alone() -> None:
    assert [p.stem for p in STUDY] == ["mambainllama", "matvlm", "mohawk", "ours", "radlads"]
    configs = [load_recipe(p) for p in STUDY]
    assert len({c.run_dir for c in configs}) == len(configs)
    for c in configs:
        same = replace(c, run_dir="r", stages=configs[0].stages, student=replace(c.student, mixer="mamba2"))
        assert same == replace(configs[0], run_dir="r")
        assert all(stage.batch == 1 for stage in c.stages if isinstance(stage, TrainStage))


@pytest.mark.parametrize(("budget", "spent"), [(10_000, 9_728), (30_000, 29_696), (100_000, 99_840)])
def test_the_studys_budgets_are_spent_alike_with_calibration_counted(budget: int, spent: int) -> None:
    for recipe in STUDY:
        reading = [
            s for s in load_recipe(recipe, [f"budget={budget}"]).stages if isinstance(s, CalibrateStage | TrainStage)
        ]
        assert all(stage.tokens >= 512 for stage in reading)
        assert sum(stage.tokens for stage in reading) == spent, recipe.stem
