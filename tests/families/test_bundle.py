"""A saved hybrid loads where ssmorph is not installed, and gives the same; the package still goes first where it is."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, dynamic_module_utils

import ssmorph.hf  # noqa: F401  registers the classes
from ssmorph.convert import bundle
from ssmorph.convert.modeling import SsmorphConfig, SsmorphForCausalLM
from tests.families import load_bundle
from tests.families.tiny import ROWS, family_teacher
from tests.models import WINDOWED_HEADS, tiny_hybrid

KINDS = ("mamba2", "discrete_mamba2")


def save(model: Any, folder: Path) -> None:
    """A model, and what it gives."""
    model.save_pretrained(folder)
    x = torch.randint(0, 256, (2, 30), generator=torch.Generator().manual_seed(0))
    torch.save({"x": x, **load_bundle.results(model, x)}, folder / "expected.pt")


def test_every_family_loads_without_the_package(tmp_path: Path) -> None:
    for i, row in enumerate(ROWS):
        kind = KINDS[i % 2]
        save(tiny_hybrid(kind, (0, 1, 2, 3) if i % 3 == 0 else (1, 3), family_teacher(row)), tmp_path / "m" / row)
    for kind in (*KINDS, "windowed_mamba2", "mamba2_heads", WINDOWED_HEADS):
        save(tiny_hybrid(kind), tmp_path / "m" / f"llama-{kind}")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-I", load_bundle.__file__, str(tmp_path / "m"), str(tmp_path / "again")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == f"loaded {len(ROWS) + 5}"


@pytest.mark.parametrize("trust", [None, True])
def test_the_package_goes_first_and_asks_nothing(
    trust: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def answer(_prompt: str) -> str:
        raise AssertionError("a question was asked")

    tiny_hybrid().save_pretrained(tmp_path)
    capfd.readouterr()
    monkeypatch.setattr("builtins.input", answer)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=trust)
    assert isinstance(model, SsmorphForCausalLM)
    assert type(AutoConfig.from_pretrained(tmp_path, trust_remote_code=trust)) is SsmorphConfig
    said = "".join(capfd.readouterr())
    assert "remote" not in said
    assert "custom code" not in said


def test_a_saved_folder_names_its_code_once(tmp_path: Path) -> None:
    tiny_hybrid().save_pretrained(tmp_path / "a")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    model.config.auto_map = {"AutoConfig": "someone/else--modeling_ssmorph.SsmorphConfig"}
    model.save_pretrained(tmp_path / "b")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in "ab"]
    assert configs[0]["auto_map"] == configs[1]["auto_map"] == bundle.AUTO_MAP
    text = (tmp_path / "b" / load_bundle.BUNDLE).read_text()
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n# Written by ssmorph ")
    assert "plain torch" in text
    assert text == (tmp_path / "a" / load_bundle.BUNDLE).read_text()


def remote(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What trust_remote_code loads from a folder, though the package is here."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder.parent / "cache"))
    name = bundle.AUTO_MAP["AutoModelForCausalLM"]
    model = dynamic_module_utils.get_class_from_dynamic_module(name, str(folder)).from_pretrained(folder)
    assert type(model).__module__.startswith("transformers_modules.")
    return model


@torch.no_grad()
@pytest.mark.parametrize("kind", ["windowed_mamba2", "mamba2_heads"])
def test_saved_code_and_the_package_run_side_by_side(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randint(0, 256, (1, 30), generator=torch.Generator().manual_seed(0))
    models = [tiny_hybrid(kind)]
    expected = models[0](x).logits
    for name in ("flash-a", "b"):
        models[0].save_pretrained(tmp_path / name)
        assert "ssmorph_attending" not in (tmp_path / name / "config.json").read_text()
        models.append(remote(tmp_path / name, monkeypatch))
    assert len({type(model).__module__ for model in models}) == 3
    for model in (*models, *models, pickle.loads(pickle.dumps(models[1]))):
        assert (model(x).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("SIZE = 2\ndef root():\n    return SIZE", "SIZE means two things"),
        ("import math as helper\ndef root():\n    return helper", "helper means two things"),
        ("def root():\n    return absent", r"nothing defines \['absent'\]"),
        ("def root(x: Absent):\n    return [y + z for y in x]", r"nothing defines \['z'\]"),
        ("from .a import SIZE as size\ndef root():\n    return size", "renames"),
        ("from . import a\ndef root():\n    return a.SIZE", r"nothing defines \['a'\]"),
        ("def root():\n    from ssmorph import errors\n    return errors", "imports of ours are left"),
        ("def root():\n    import ssmorph.hf", "imports of ours are left"),
        ("import ssmorph.hf\ndef root():\n    pass", "whole"),
        ("if True:\n    root = 1", "cannot move line 1"),
    ],
)
def test_what_one_namespace_cannot_hold_is_caught(second: str, message: str) -> None:
    first = "SIZE = 1\ndef helper():\n    return SIZE"
    with pytest.raises(AssertionError, match=message):
        bundle.bundle({"ssmorph.a": first, "ssmorph.b": second}, ("root",))


def test_only_what_is_reached_is_taken() -> None:
    first = "import torch\nimport math\n# why\nSIZE = 1\ndef helper():\n    return SIZE\ndef other():\n    return math"
    second = '"""Doc."""\nfrom .a import helper\n@helper\ndef root():\n    return [n for n in torch.ones(2)]'
    text = bundle.bundle({"ssmorph.a": first, "ssmorph.b": second}, ("root",))
    assert "# why\nSIZE = 1" in text
    assert "@helper\ndef root" in text
    assert "import torch\n" in text
    assert "# --- ssmorph.b ---\n#\n# Doc.\n" in text
    for left_out in ("math", "other"):
        assert left_out not in text
