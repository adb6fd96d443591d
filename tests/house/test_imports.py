"""Dependencies point one way, and what must stay light stays light."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.house.imports import imported, modules, wrong_arrows
from tests.house.tree import ROOT

LIGHT = (
    "ssmorph",
    "ssmorph.errors",
    "ssmorph.cli",
    "ssmorph.__main__",
    "ssmorph.stages.config",
    "ssmorph.stages.recipe",
)


def test_every_room_was_read() -> None:
    names = modules()
    assert {"ssmorph.__init__", "ssmorph.errors", "ssmorph.stages.config"} <= names.keys()
    assert {name.split(".")[1] for name in names} >= {"kernels", "convert", "stages"}


@pytest.mark.parametrize("module", modules())
def test_imports_point_one_way(module: str) -> None:
    assert wrong_arrows(modules()[module].read_text(encoding="utf-8"), module) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ssmorph.kernels.ssd.chunked", "import transformers"),
        ("ssmorph.kernels.ssd.chunked", "def f():\n    from ssmorph.convert import plan"),
        ("ssmorph.kernels.ssd.chunked", "from ...convert.plan import LayerPlan"),
        ("ssmorph.kernels.ssd.__init__", "from ... import stages"),
        ("ssmorph.convert.plan", "from ..stages import loop"),
        ("ssmorph.convert.mixers.base", "import ssmorph.cli"),
        ("ssmorph.convert.plan", "from ssmorph import convert_model"),
        ("ssmorph.stages.loop", "from ..cli import main"),
        ("ssmorph.stages.loop", "from kernels.ssd import ssd"),
        ("ssmorph.stages.data", "import importlib\nimportlib.import_module('gensim')"),
        ("ssmorph.cli", "import convert"),
        ("ssmorph.errors", "from . import hf"),
    ],
)
def test_a_wrong_arrow_is_found(module: str, source: str) -> None:
    assert len(wrong_arrows(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "ssmorph.kernels.ssd.chunked",
            "import math, torch\nfrom ...errors import fail\nfrom ..common import dispatch",
        ),
        (
            "ssmorph.convert.mixers.base",
            "from ssmorph.kernels.ssd import ssd\nfrom ..plan import LayerPlan\nimport transformers",
        ),
        ("ssmorph.stages.loop", "from ssmorph.convert import plan\nfrom ssmorph import __version__"),
        ("ssmorph.cli", "from .stages import pipeline\nfrom ssmorph.convert import plan"),
    ],
)
def test_a_right_arrow_passes(module: str, source: str) -> None:
    assert wrong_arrows(source, module) == []


def test_relative_imports_are_resolved_from_the_package_that_holds_them() -> None:
    assert list(imported("from . import a", "ssmorph.convert.__init__")) == ["ssmorph.convert.a"]
    assert list(imported("from . import a", "ssmorph.convert.plan")) == ["ssmorph.convert.a"]
    assert list(imported("from ..x import a", "ssmorph.convert.mixers.base")) == ["ssmorph.convert.x.a"]


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_neither_torch_nor_transformers(module: str) -> None:
    code = f"import {module}, sys; print(*sorted({{'torch', 'transformers', 'triton', 'wandb'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
