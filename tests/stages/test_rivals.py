"""Windows without a state, trained as the hybrid was, beside it in the report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ssmorph import verbs

from .tiny_run import run_tiny

WINDOWED = ("student.mixer=windowed_mamba2", "student.window=12", "student.sinks=2", "student.state=8",
            "stages=[{kind: surgery}, {kind: calibrate, tokens: 384}, {kind: logits, tokens: 480}]")  # fmt: skip
SCORED = ("evaluate.suite=short", "evaluate.tokens=384", "evaluate.trained_controls=true")


def rows(run: Path, name: str = "report.json") -> dict[str, Any]:
    text: list[dict[str, Any]] = json.loads((run / name).read_text())["text"]
    return text[0]["models"]


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rivals") / "run"
    # the quick recipe changes stages that this one has not
    return verbs.convert("configs/tiny.yaml", *WINDOWED, *SCORED, run_dir=str(folder), say=lambda line: None)


def test_both_windows_are_trained_on_what_the_hybrid_was(windowed: Path) -> None:
    found = rows(windowed)
    assert {"own_window", "own_window_trained", "window", "window_trained"} <= found.keys()
    # its state answers nothing, so the copy is the window alone
    assert "copy" not in found
    assert "The copy is W" in verbs.report(windowed).read_text()
    for name in ("own_window", "window"):
        assert found[f"{name}_trained"]["kl"] != pytest.approx(found[name]["kl"], rel=1e-3)
    for name, tokens in (("own_window_trained", 12), ("window_trained", 12 + 4)):
        config = (windowed / "rivals" / name / "config.yaml").read_text()
        assert "mixer: window\n" in config
        assert f"window: {tokens}\n" in config
        done = json.loads((windowed / "rivals" / name / "2-logits" / "DONE").read_text())
        own = json.loads((windowed / "2-logits" / "DONE").read_text())
        assert done["summary"]["tokens"] == own["summary"]["tokens"] == 480


def test_another_evaluation_does_not_train_them_again_where_the_run_was_moved_to(
    windowed: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    windowed = Path(shutil.copytree(windowed, tmp_path / "moved"))
    verbs.evaluate_run(windowed, suite="short", tokens=96, say=said.append)
    assert "window_trained" in rows(windowed, "report-short.json")
    assert not any("step" in line or "starting" in line for line in said if line.startswith("rivals"))


def test_a_mixer_without_a_window_has_one_rival_that_aligns_outputs_where_it_aligns_matrices(tmp_path: Path) -> None:
    run = run_tiny(tmp_path / "run", *SCORED)
    found = rows(run)
    assert "window_trained" in found
    assert "own_window_trained" not in found
    assert "copy" in found
    assert [p.name for p in sorted((run / "rivals" / "window_trained").glob("[0-9]-*"))] == [
        "0-surgery", "1-calibrate", "2-hidden", "3-hidden", "4-logits"
    ]  # fmt: skip
