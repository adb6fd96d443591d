"""Recipes: what is read, what is refused and in which words."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from ssmorph.errors import UserError
from ssmorph.stages.config import (
    CalibrateStage,
    HiddenStage,
    LogitsStage,
    OptimConfig,
    RunConfig,
    StudentConfig,
    SurgeryStage,
    TeacherConfig,
)
from ssmorph.stages.recipe import build, difference, dump, load_recipe

HEAD = "teacher: {source: some-model}\nrun_dir: runs/a\n"
STAGES = "stages: [{kind: surgery}, {kind: hidden}, {kind: logits}]\n"


def load(folder: Path, text: str = HEAD + STAGES, *overrides: str, **top: object) -> RunConfig:
    file = folder / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return load_recipe(file, overrides, **top)


def test_left_out_keys_have_their_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, HEAD) == RunConfig(teacher=TeacherConfig(source="some-model"), run_dir="runs/a")


def test_importing_and_loading_takes_neither_torch_nor_transformers(tmp_path: Path) -> None:
    load(tmp_path)
    code = (
        "import sys; from ssmorph.stages.recipe import load_recipe; load_recipe(sys.argv[1], ['seed=1']);"
        "print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "recipe.yaml"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"seed": 7, "threads": 2, "tracker": "wandb"},
        {"run_dir": "1e-4"},
        {"run_dir": "null"},
        {"run_dir": "a: b # ä\n 'c'"},
        {"student": StudentConfig(layers=(0, 3, 5), mixer="discrete_mamba2")},
        {"stages": (SurgeryStage(), CalibrateStage(tokens=9), HiddenStage(), HiddenStage(target="block"))},
        {"stages": (SurgeryStage(), LogitsStage(optim=OptimConfig(lr=0.1 + 0.2, clip=float("inf"), betas=(0.0, 0.5))))},
    ],
)
def test_dump_and_load_give_an_equal_configuration(tmp_path: Path, change: dict) -> None:
    config = dataclasses.replace(RunConfig(teacher=TeacherConfig(source="m"), run_dir="r"), **change)
    assert load(tmp_path, dump(config)) == config


def test_base_is_merged_and_its_lists_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.yaml").write_text("teacher: {source: m, revision: main}\nseed: 1\ndata: {sources: [a, b]}\n")
    (tmp_path / "sub" / "r.yaml").write_text(
        "base: ../base.yaml\nrun_dir: r\nteacher: {source: n}\ndata: {sources: [c]}\n"
    )
    config = load_recipe(tmp_path / "sub" / "r.yaml")
    assert config.teacher == TeacherConfig(source="n", revision="main")
    assert (config.seed, config.data.sources) == (1, ("c",))


def test_later_settings_win_over_earlier_ones(tmp_path: Path) -> None:
    config = load(tmp_path, HEAD + "seed: 1\nthreads: 1\n", "seed=3", "seed=4", seed=2, threads=2)
    assert (config.seed, config.threads) == (4, 2)
    assert load(tmp_path, HEAD + "seed: 1\n", seed=None).seed == 1


@pytest.mark.parametrize("path", ["stages.logits.optim.lr", "stages.2.optim.lr", "stages[2].optim.lr"])
def test_stages_are_addressed_by_kind_or_index(tmp_path: Path, path: str) -> None:
    config = load(tmp_path, HEAD + STAGES, f"{path}=1e-4")
    assert [s.optim.lr for s in config.stages if isinstance(s, HiddenStage | LogitsStage)] == [OptimConfig().lr, 1e-4]


def test_default_stages_can_be_overridden(tmp_path: Path) -> None:
    (stage,) = (s for s in load(tmp_path, HEAD, "stages.logits.tokens=512").stages if s.kind == "logits")
    assert stage.tokens == 512


def test_a_window_has_no_mixing_stage_unless_it_is_asked_for(tmp_path: Path) -> None:
    def kinds(*overrides: str) -> list[str]:
        return [stage.kind for stage in load(tmp_path, HEAD, *overrides).stages]

    assert kinds() == ["surgery", "calibrate", "mixing", "hidden", "logits"]
    windowed = "student.mixer=windowed_mamba2"
    assert (
        kinds(windowed) == kinds(windowed, "stages.hidden.tokens=512") == ["surgery", "calibrate", "hidden", "logits"]
    )
    with pytest.raises(UserError, match="has no mixing matrix"):
        kinds(windowed, "stages=[{kind: surgery}, {kind: mixing}]")


def test_overrides_are_typed_as_yaml(tmp_path: Path) -> None:
    config = load(
        tmp_path, HEAD, "student.layers=[1,3]", "threads=", "evaluate.controls=false", "data.heldout_percent=5"
    )
    assert config.student.layers == (1, 3)
    assert (config.threads, config.evaluate.controls) == (None, False)
    assert isinstance(config.data.heldout_percent, float)


def test_an_override_does_not_reach_what_an_alias_repeats(tmp_path: Path) -> None:
    text = HEAD + "stages: [{kind: surgery}, {kind: hidden, optim: &o {clip: 2}}, {kind: logits, optim: *o}]"
    config = load(tmp_path, text, "stages.logits.optim.clip=3")
    assert [s.optim.clip for s in config.stages if isinstance(s, HiddenStage | LogitsStage)] == [2.0, 3.0]


@pytest.mark.parametrize("written", ["1e-4", "1E-4", "0.0001", "1.0e-4", ".1e-3", "'1e-4'"])
def test_floats_in_every_spelling(tmp_path: Path, written: str) -> None:
    stage = load(tmp_path, HEAD + STAGES, f"stages.logits.optim.lr={written}").stages[2]
    assert isinstance(stage, LogitsStage)
    assert stage.optim.lr == 1e-4


REFUSED = [
    ("unknown key", "studnet={}", ["studnet: ", "Did you mean 'student'?"]),
    ("unknown nested key", "stages.logits.optim.lrr=1", ["stages[2].optim.lrr: ", "Did you mean 'lr'?"]),
    ("key of another kind", "stages.hidden.temperature=2", ["stages[1].temperature: "]),
    ("bool for int", "seed=true", ["seed: must be a whole number; got True"]),
    ("float for int", "seed=1.0", ["seed: must be a whole number; got 1.0", "Write 1."]),
    ("exponent for int", "stages.logits.tokens=1e6", ["stages[2].tokens: ", "Write 1000000."]),
    ("bool for float", "stages.logits.optim.lr=true", ["stages[2].optim.lr: must be a number; got True"]),
    ("text for float", "stages.logits.optim.lr=fast", ["stages[2].optim.lr: must be a number; got 'fast'"]),
    ("not a number", "stages.logits.ce_weight=.nan", ["stages[2].ce_weight: must be a number; got nan"]),
    ("too large", f"stages.logits.optim.lr=1{'0' * 400}", ["stages[2].optim.lr: must be a number"]),
    ("int for bool", "evaluate.controls=1", ["evaluate.controls: must be true or false; got 1"]),
    ("int for text", "teacher.source=3", ["teacher.source: must be text; got 3", "quotes"]),
    ("null for text", "teacher.source=", ["teacher.source: must be text; got nothing"]),
    ("literal", "student.mixer=mamba", ["student.mixer: must be one of mamba2", "Did you mean 'mamba2'?"]),
    ("kind", "stages.1.kind=hiden", ["stages[1].kind: ", "Did you mean 'hidden'?"]),
    ("kind of another type", "stages.1.kind=[hidden]", ["stages[1].kind: ", "['hidden']"]),
    ("stage without kind", "stages=[{kind: surgery}, {}]", ["stages[1].kind: "]),
    ("stage as text", "stages=[surgery]", ["stages[0].kind: "]),
    ("list for section", "data=[1]", ["data: must be a mapping; got [1]"]),
    ("empty section", "data=", ["data: must be a mapping; got nothing"]),
    ("scalar for list", "data.sources=a.txt", ["data.sources: must be a list; got 'a.txt'"]),
    ("item of a list", "data.sources=[a, 3]", ["data.sources[1]: must be text; got 3"]),
    ("item of a union", "student.layers=[1, x]", ["student.layers[1]: must be a whole number; got 'x'"]),
    ("one of a union", "student.layers=5", ["student.layers: must be text or a list; got 5", "[5]"]),
    ("length", "stages.logits.optim.betas=[0.9]", ["stages[2].optim.betas: must have 2 entries; got 1"]),
    ("rule of a section", "stages.logits.optim.lr=-1", ["stages[2].optim.lr: must be positive; got -1.0"]),
    ("rule of a stage", "stages.logits.temperature=0", ["stages[2].temperature: must be positive"]),
    ("rule of a base class", "stages.hidden.tokens=0", ["stages[1].tokens: must be positive"]),
    ("no layers", "student.layers=[]", ["student.layers: needs a layer to convert"]),
    ("none of NAME-K", "student.layers=uniform-0", ["student.layers: needs a layer to convert"]),
    ("no held-out tokens", "evaluate.tokens=0", ["evaluate.tokens: must be positive; got 0"]),
    ("a seed that torch cannot hold", f"seed={2**64}", ["seed: must be below 2^63"]),
    ("no folder", "run_dir=''", ["run_dir: must name a folder"]),
    ("rule of the whole", "stages=[{kind: hidden}]", ["stages: the first stage is surgery"]),
    (
        "calibration of a random start",
        "stages=[{kind: surgery, init: random}, {kind: calibrate}]",
        ["stages.surgery.init: calibration starts from a copy; got random"],
    ),
    (
        "steps of a calibration",
        "stages=[{kind: surgery}, {kind: calibrate, refine_steps: -1}]",
        ["stages[1].refine_steps: must not be negative; got -1"],
    ),
    (
        "rate of these steps",
        "stages=[{kind: surgery}, {kind: calibrate, refine_lr: 0}]",
        ["stages[1].refine_lr: must lie between 0 and 1; got 0"],
    ),
    ("layer loss", "stages.logits.layer_loss=l1", ["stages[2].layer_loss: must be one of l2, frobenius"]),
    ("format", "run_format=99", ["run_format: ", "99"]),
    ("a seed", "seed=-1", ["seed: must not be negative; got -1"]),
    ("no value", "seed", ["override: ", "'seed'"]),
    ("no path", "=3", ["override: ", "'=3'"]),
    ("empty key", "student..layers=all", ["override: ", "student..layers"]),
    ("value is no YAML", "seed=[1", ["override seed", "must be valid YAML"]),
    ("below a scalar", "run_dir.x=1", ["run_dir.x: has nothing below it"]),
    ("far below a scalar", "run_dir.x.y=1", ["run_dir.x: has nothing below it"]),
    ("index too large", "stages.9.tokens=1", ["stages.9: ", "'9'"]),
    ("kind not in the recipe", "stages.logit.tokens=1", ["stages.logit: ", "Did you mean 'logits'?"]),
]


@pytest.mark.parametrize(("override", "parts"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_mistakes_are_named_by_path_rule_and_value(tmp_path: Path, override: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, HEAD + STAGES, override)
    assert str(caught.value).startswith(parts[0])
    assert [part for part in parts if part not in str(caught.value)] == []


def test_a_kind_that_comes_twice_must_be_addressed_by_index(tmp_path: Path) -> None:
    text = HEAD + "stages: [{kind: surgery}, {kind: hidden}, {kind: hidden}]"
    with pytest.raises(UserError, match=r"stages\.hidden: is ambiguous"):
        load(tmp_path, text, "stages.hidden.tokens=8")
    assert [getattr(s, "tokens", None) for s in load(tmp_path, text, "stages.2.tokens=8").stages][2] == 8


@pytest.mark.parametrize(
    ("text", "missing"),
    [("run_dir: r", "teacher"), ("teacher: {source: m}", "run_dir"), ("teacher: {}\nrun_dir: r", "teacher.source")],
)
def test_required_keys_are_named(tmp_path: Path, text: str, missing: str) -> None:
    with pytest.raises(UserError, match=f"^{missing}: is required"):
        load(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("seed: 1\n  x: [", "line 2, column 4"),
        ("seed: 1\nseed: 2\n", "line 2, column 1"),
        ("student: {layers: all, layers: all}", "line 1, column 24"),
        ("seed: !!python/object:os.system x", "line 1, column 7"),
    ],
)
def test_bad_yaml_is_located(tmp_path: Path, text: str, where: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'recipe.yaml'}, {where}: must be valid YAML")


@pytest.mark.parametrize("content", [b"", b"- a\n", b"\xff\xfe\xfa", b"seed: 2024-99-99\n", b"a: \x07\n"])
def test_files_that_are_no_recipe_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    ("base", "rule"), [("below.yaml", "no base of its own"), ("gone.yaml", "gone.yaml"), ("3", "must be a file name")]
)
def test_bad_bases_are_refused(tmp_path: Path, base: str, rule: str) -> None:
    (tmp_path / "below.yaml").write_text("base: other.yaml\n")
    with pytest.raises(UserError, match=rule):
        load(tmp_path, HEAD + f"base: {base}\n")


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_difference_names_every_changed_value(tmp_path: Path) -> None:
    old = load(tmp_path)
    assert difference(old, old) == []
    new = load(tmp_path, HEAD + STAGES, "stages.logits.optim.lr=1e-4", "seed=3", "student.layers=[1]")
    assert difference(old, new) == [
        ("student.layers", "uniform-15", [1]),
        ("stages[2].optim.lr", OptimConfig().lr, 1e-4),
        ("seed", 0, 3),
    ]
    shorter = load(tmp_path, HEAD, "stages=[{kind: surgery}, {kind: hidden}]")
    assert [(path, after) for path, _, after in difference(old, shorter)] == [("stages[2]", None)]


def test_build_refuses_what_is_no_mapping() -> None:
    with pytest.raises(UserError, match=r"^recipe: must be a mapping"):
        build([1])  # type: ignore[arg-type]
