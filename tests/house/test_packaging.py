"""Sdist and wheel hold every room, and an installed wheel imports. Built without network, by the backend itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.house.imports import modules
from tests.house.tree import PACKAGE, ROOMS, ROOT, shipped

IGNORED = shutil.ignore_patterns("__pycache__", "*.egg-info")


class Built(NamedTuple):
    """What the backend made of one copy of the tree."""

    sdist: Path
    wheel: Path
    wheel_of_sdist: Path


def build(source: Path, kind: str, out: Path) -> Path:
    """Runs one hook of the build backend in `source`; the made file."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, out], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    copy = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("src", *ROOMS):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=IGNORED)
    sdist = build(copy, "sdist", tmp_path_factory.mktemp("sdist"))
    wheel = build(copy, "wheel", tmp_path_factory.mktemp("wheel"))
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    (inner,) = unpacked.iterdir()
    return Built(sdist, wheel, build(inner, "wheel", tmp_path_factory.mktemp("wheel_of_sdist")))


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*pip, str(built.wheel)], check=True)
    return target


def package_files(names: list[str]) -> list[str]:
    """The files of the package among a wheel's, sorted."""
    return sorted(name for name in names if name.startswith("ssmorph/") and not name.endswith("/"))


def test_what_is_shipped_comes_from_every_room() -> None:
    assert {name.split("/")[1] for name in shipped()} >= {*ROOMS, "py.typed", "__init__.py"}


@pytest.mark.parametrize("which", ["wheel", "wheel_of_sdist"])
def test_wheel_holds_every_file_and_no_other(built: Built, which: str) -> None:
    with zipfile.ZipFile(getattr(built, which)) as archive:
        assert package_files(archive.namelist()) == shipped()


def test_sdist_holds_every_file(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        files = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert {"pyproject.toml", "README.md", "LICENSE", *(f"src/{name}" for name in shipped())} <= files


def test_wheel_carries_licence_and_command(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        names = archive.namelist()
        entry = next(archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    assert any(name.endswith("licenses/LICENSE") for name in names)
    module, _, function = entry.partition("ssmorph = ")[2].strip().partition(":")
    source = PACKAGE.parent / f"{module.replace('.', '/')}.py"
    assert f"ssmorph/{source.name}" in names
    assert f"def {function}(" in source.read_text(encoding="utf-8")


@pytest.mark.slow
def test_an_installed_wheel_imports_every_module(installed: Path, tmp_path: Path) -> None:
    names = sorted(name.removesuffix(".__init__") for name in modules() if not name.endswith(("__main__", ".triton")))
    code = (
        "import importlib, sys\n"
        "found = [importlib.import_module(name) for name in sys.argv[2:]]\n"
        "strays = [m.__file__ for m in found if not m.__file__.startswith(sys.argv[1])]\n"
        "assert not strays, strays\n"
    )
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", code, str(installed), *names]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
