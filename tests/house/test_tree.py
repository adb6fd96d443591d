"""The layout that packaging and imports rely on. CONTRIBUTING.md says why it is so."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.house.tree import CODE_ROOMS, PACKAGE, ROOMS, ROOT, ours

# the names are apart from their slashes and dashes, so that this file does not find itself
FOLDERS = ("work", "home", "root", "tmp", "opt/wheels", "opt/pypi")
MACHINE_PATH = re.compile(rf"(?<![\w.~-])/(?:{'|'.join(FOLDERS)})/[\w.]")
OPTIONS = ("extra-index-url", "index-url", "find-links")
INDEX = re.compile(rf"--(?:{'|'.join(OPTIONS)})\b|\bpypi\.(?:org|python)\b|download\.pytorch\b")


def folders(top: Path) -> set[Path]:
    """`top` and every folder under it that holds a file of ours, at any depth."""
    return {folder for file in ours(top) for folder in file.parents if folder.is_relative_to(top)}


def test_kernels_is_no_regular_package_at_its_root() -> None:
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("room", CODE_ROOMS)
def test_folders_of_code_are_packages(room: str) -> None:
    missing = {f for f in folders(ROOT / room) - {ROOT / "kernels"} if not (f / "__init__.py").is_file()}
    assert missing == set()


def test_every_folder_of_tests_is_a_package() -> None:
    tests, data = ROOT / "tests", ROOT / "tests" / "data"
    assert {f for f in folders(tests) - folders(data) if not (f / "__init__.py").is_file()} == set()
    assert [f for f in ours(data) if f.suffix == ".py"] == []


@pytest.mark.parametrize("room", ROOMS)
def test_folder_names_can_be_package_names(room: str) -> None:
    assert {f.name for f in folders(ROOT / room) if not f.name.isidentifier()} == set()


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_linked_relatively_under_src(room: str) -> None:
    link = PACKAGE / room
    assert link.is_symlink(), "a plain file here means a checkout without symlinks: see CONTRIBUTING.md"
    assert os.readlink(link) == f"../../{room}"
    assert link.resolve() == ROOT / room


def test_ci_script_can_be_executed() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.mark.parametrize("forbidden", [MACHINE_PATH, INDEX], ids=["machine path", "package index"])
def test_no_file_names_a_machine(forbidden: re.Pattern[str]) -> None:
    found = []
    for path in ours(ROOT):
        text = path.read_bytes().decode("utf-8", errors="replace")
        found += [f"{path.relative_to(ROOT)}: {hit.group()}" for hit in forbidden.finditer(text)]
    assert found == []


@pytest.mark.parametrize("text", ["see /tm" + "p/x", 'open("/wor' + 'k/y")'])
def test_machine_paths_are_recognised(text: str) -> None:
    assert MACHINE_PATH.search(text)
    assert not MACHINE_PATH.search("~/" + text[-3:] + " and a/wor" + "k/b")
