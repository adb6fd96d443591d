"""The pinned files agree with pyproject.toml, and pyproject.toml with what the code imports."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from importlib.metadata import packages_distributions

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.house.imports import modules, third_party
from tests.house.tree import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
PIN = re.compile(r"[A-Za-z0-9][\w.-]*==[0-9][\w.]*( ; .+)?")
RESOLVED = ("demo", "test", "eval")
WITHOUT_DEPENDENCIES = ("data", "triton")


def lines(name: str) -> list[str]:
    """Lines of requirements/<name>.txt without comments and `-r`."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith(("#", "-r "))]


def pins(*names: str) -> dict[str, str]:
    """Package to pinned version over several files."""
    found = [Requirement(line) for name in names for line in lines(name)]
    return {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in found}


def extra(name: str) -> list[Requirement]:
    """What an extra asks for, our own extras inside it unfolded."""
    found = []
    for requirement in map(Requirement, EXTRAS[name]):
        found += _all_of(requirement.extras) if requirement.name == PROJECT["name"] else [requirement]
    return found


def _all_of(extras: Iterable[str]) -> list[Requirement]:
    return [requirement for name in sorted(extras) for requirement in extra(name)]


def declared(*extras: str) -> list[Requirement]:
    """Core dependencies and those of the extras."""
    return [*map(Requirement, PROJECT["dependencies"]), *_all_of(extras)]


@pytest.mark.parametrize("name", [*RESOLVED, *WITHOUT_DEPENDENCIES])
def test_every_line_is_one_plain_pin(name: str) -> None:
    assert lines(name)
    assert [line for line in lines(name) if not PIN.fullmatch(line)] == []


@pytest.mark.parametrize(
    ("wanted", "files"), [("demo", ["demo"]), ("test", ["demo", "test", "triton"]), ("eval", ["demo", "test", "eval"])]
)
def test_pins_satisfy_what_is_declared(wanted: str, files: list[str]) -> None:
    pinned = pins(*files)
    for requirement in declared(wanted):
        assert pinned.get(canonicalize_name(requirement.name), "missing") in requirement.specifier, requirement


def test_nothing_is_pinned_twice() -> None:
    names = [canonicalize_name(Requirement(line).name) for f in [*RESOLVED, *WITHOUT_DEPENDENCIES] for line in lines(f)]
    assert len(names) == len(set(names))


def test_the_pins_can_build_the_package_without_isolation() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    assert all(pins("demo")[Requirement(text).name] in Requirement(text).specifier for text in build)


def test_data_packages_are_declared_nowhere() -> None:
    everything = {canonicalize_name(requirement.name) for requirement in declared(*EXTRAS)}
    assert everything & pins("data").keys() == set()


def test_every_dependency_has_a_floor_and_a_ceiling() -> None:
    bounds = {requirement.name: {spec.operator for spec in requirement.specifier} for requirement in declared(*EXTRAS)}
    assert {name for name, operators in bounds.items() if operators != {">=", "<"}} == set()


def test_what_the_code_imports_is_declared() -> None:
    known = {canonicalize_name(requirement.name) for requirement in declared(*EXTRAS)}
    owners = packages_distributions()
    undeclared = set()
    for module, path in modules().items():
        for name in third_party(path.read_text(encoding="utf-8"), module):
            if not {canonicalize_name(owner) for owner in owners.get(name, [name])} & known:
                undeclared.add(f"{module}: {name}")
    assert undeclared == set()
