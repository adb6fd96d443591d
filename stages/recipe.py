"""Reads a recipe into the dataclass tree, strictly: a mistake is named by path, what came, and the nearest known name.

Standard library and PyYAML only.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from ..errors import UserError, fail, nearest
from .budget import spread
from .config import STAGES, RunConfig, as_dict, default_stages

# YAML 1.1 wants a point and a signed exponent in a float, and reads 1e-4 as text.
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
_KINDS: dict[Any, str] = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Safe YAML that refuses a key written twice."""


def _mapping(loader: Any, node: Any) -> dict:
    seen: list[Any] = []
    for key, _ in node.value:
        if key.value in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} a second time", key.start_mark)
        seen.append(key.value)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def load_recipe(path: str | Path, overrides: Sequence[str] = (), **top: Any) -> RunConfig:
    """The recipe of a YAML file, with `a.b=value` overrides and top-level keys replaced.

    `base: other.yaml`, relative to the file, is read first and merged under it; a list replaces a list. Stages are
    addressed by kind or index: `stages.logits.optim.lr=1e-4`. `budget=N` shares N tokens out among the stages.

    Raises:
        ValueError: anything the recipe alone shows to be wrong.
    """
    tree = _read(Path(path))
    base = tree.pop("base", None)
    if base is not None:
        if not isinstance(base, str):
            raise fail(f"{path}: base", "must be a file name", _show(base), "Write base: other.yaml.")
        below = _read(Path(path).parent / base)
        if "base" in below:
            raise fail(f"{path}: base", "a base has no base of its own", base, "Write the shared part into one file.")
        tree = _merge(below, tree)
    for key, value in top.items():
        if value is not None:
            tree[key] = value
    return _changed(tree, overrides)


def recipe_of_model(source: str, layers: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The recipe that says nothing but its teacher and which layers to convert.

    Raises:
        ValueError: an override that is no recipe's.
    """
    return _changed({"teacher": {"source": source}, "student": {"layers": layers}, "run_dir": "runs/plan"}, overrides)


def _changed(tree: dict[str, Any], overrides: Sequence[str]) -> RunConfig:
    tree = _plain(tree)  # nothing shared: an override must not reach what a YAML alias repeats elsewhere
    for override in overrides:
        _override(tree, override)
    tree.setdefault("stages", _usual_stages(tree))
    budget = tree.pop("budget", None)
    config = build(tree)
    return config if budget is None else spread(config, _scalar(budget, int, "budget"))


def load_saved(run: Path) -> RunConfig:
    """The recipe that a run directory was started with.

    Raises:
        ValueError: a config.yaml that was changed by hand into something else.
    """
    try:
        return load_recipe(run / "config.yaml")
    except UserError as error:
        do = "Restore it, or use another run_dir."
        raise fail(str(run / "config.yaml"), "must be the recipe of the run", f"'{error}'", do) from error


def build(tree: dict[str, Any]) -> RunConfig:
    """The dataclass tree of plain values."""
    config = _convert(tree, RunConfig, "")
    assert isinstance(config, RunConfig)
    return config


def dump(config: RunConfig) -> str:
    """YAML that `load_recipe` reads back to an equal tree."""
    return yaml.safe_dump(_plain(as_dict(config)), sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise fail("recipe", "must be a readable YAML file", f"{path} ({error})", "Check the path.") from error
    tree = _parse(text, str(path))
    if not isinstance(tree, dict):
        raise fail(str(path), "a recipe is a mapping", type(tree).__name__, "Start with 'teacher:'.")
    return tree


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        if error.problem_mark is not None:
            where += f", line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
        raise fail(where, "must be valid YAML", error.problem or error.context, "Mend that line.") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-99-99
        raise fail(where, "must be valid YAML", " ".join(str(error).split()), "Mend or quote it.") from error


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = _merge(below[key], value) if both else value
    return merged


def _override(tree: dict[str, Any], text: str) -> None:
    path, separator, value = text.partition("=")
    *parents, last = path.strip().removeprefix("--").replace("[", ".").replace("]", "").split(".")
    if not separator or not all([*parents, last]):
        raise fail("override", "an override is written path=value", repr(text), "For example seed=1.")
    parsed = _parse(value, f"override {path.strip()}")
    if parents[:1] == ["stages"]:
        tree.setdefault("stages", _usual_stages(tree))
    here: Any = tree
    for depth, key in enumerate(parents):
        here = _child(here, key, ".".join(parents[: depth + 1]))
    if isinstance(here, list):
        here[_stage_index(here, last, path)] = parsed
    elif isinstance(here, dict):
        here[last] = parsed
    else:
        raise fail(path, "has nothing below it", last, f"Set {'.'.join(parents)} itself.")


def _usual_stages(tree: dict[str, Any]) -> list[dict[str, Any]]:
    student = tree.get("student")
    mixer = student.get("mixer") if isinstance(student, dict) else None
    return [_plain(as_dict(stage)) for stage in default_stages(str(mixer))]


def _child(here: Any, key: str, path: str) -> Any:
    if isinstance(here, list):
        return here[_stage_index(here, key, path)]
    if not isinstance(here, dict):
        raise fail(path, "has nothing below it", key, "Check the path of the override.")
    return here.setdefault(key, {})


def _stage_index(stages: list, key: str, path: str) -> int:
    if key.isdecimal() and int(key) < len(stages):
        return int(key)
    found = [i for i, stage in enumerate(stages) if isinstance(stage, dict) and stage.get("kind") == key]
    if len(found) != 1:
        kinds = [str(stage.get("kind")) for stage in stages if isinstance(stage, dict)]
        what = "names one stage by kind or index" if not found else "is ambiguous: several stages have this kind"
        raise fail(path, what, repr(key), nearest(key, kinds) if not found else "Use its index.")
    return found[0]


def _convert(value: Any, kind: Any, path: str) -> Any:
    origin = get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return _dataclass(value, kind, path)
    if origin in (Union, types.UnionType):
        return _union(value, get_args(kind), path)
    if origin is Literal:
        return _literal(value, get_args(kind), path)
    if origin is tuple:
        return _tuple(value, get_args(kind), path)
    return _scalar(value, kind, path)


def _dataclass(value: Any, kind: Any, path: str) -> Any:
    if not isinstance(value, dict):
        raise fail(path or "recipe", "must be a mapping", _show(value), f"Give the keys of {kind.__name__}.")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in value:
        if key not in fields:
            raise fail(_join(path, str(key)), "unknown key", repr(key), nearest(str(key), fields))
    for name, field in fields.items():
        if name not in value and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise fail(_join(path, name), "is required", "nothing", f"Add '{name}:'.")
    built = {key: _convert(part, hints[key], _join(path, key)) for key, part in value.items()}
    try:
        return kind(**built)
    except UserError as error:
        raise UserError(_located(str(error), path, {kind.__name__, str(built.get("kind"))})) from error


def _located(message: str, path: str, names: set[str]) -> str:
    """The message of a section's own check, which knows its class but not its place, with the full path in front."""
    if not path or re.match(rf"{re.escape(path)}[.:\[]", message):
        return message
    head = re.match(r"\w+", message)
    if head and head.group() in names | {path.rpartition(".")[2]}:
        return path + message[head.end() :]
    return f"{path}: {message}"


def _union(value: Any, kinds: tuple, path: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    if all(dataclasses.is_dataclass(k) for k in kinds):
        tag = value.get("kind") if isinstance(value, dict) else None
        if not isinstance(tag, str) or tag not in STAGES:
            raise fail(f"{path}.kind", "must be a kind of stage", repr(tag), nearest(str(tag), STAGES))
        return _convert(value, STAGES[tag], path)
    kinds = tuple(k for k in kinds if k is not type(None))
    fitting = [k for k in kinds if (get_origin(k) is tuple) == isinstance(value, (list, tuple))]
    if len(kinds) > 1 and fitting == [str] and not isinstance(value, str):
        raise fail(path, "must be text or a list", _show(value), f"Write [{value}] if you mean one entry.")
    return _convert(value, fitting[0] if fitting else kinds[0], path)


def _literal(value: Any, choices: tuple, path: str) -> Any:
    if value not in choices or isinstance(value, bool):
        raise fail(
            path, f"must be one of {', '.join(map(str, choices))}", _show(value), nearest(str(value), map(str, choices))
        )
    return value


def _tuple(value: Any, kinds: tuple, path: str) -> tuple:
    if not isinstance(value, (list, tuple)):
        raise fail(path, "must be a list", _show(value), "Write [a, b].")
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise fail(path, f"must have {len(kinds)} entries", len(value), "Check the list.")
    return tuple(_convert(part, kind, f"{path}[{i}]") for i, (part, kind) in enumerate(zip(value, kinds, strict=True)))


def _scalar(value: Any, kind: type, path: str) -> Any:
    assert kind in _KINDS, f"{path}: recipes cannot express {kind}"
    number = _number(value)
    if kind is float and isinstance(number, float) and not math.isnan(number):
        return number
    if kind is not float and type(value) is kind:
        return value
    do = "Put it in quotes." if kind is str else f"Write {_KINDS[kind]}."
    if kind is int and isinstance(number, float) and number.is_integer():
        do = f"Write {int(number)}."
    raise fail(path, f"must be {_KINDS[kind]}", _show(value), do)


def _number(value: Any) -> Any:
    """`value` as float if it is a number, or an exponent form that YAML took for text; else unchanged."""
    if type(value) in (int, float) or (isinstance(value, str) and _EXPONENT.fullmatch(value)):
        try:
            return float(value)
        except OverflowError:
            return value
    return value


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _show(value: Any) -> str:
    text = "nothing" if value is None else f"{value!r} ({type(value).__name__})"
    return text if len(text) <= 100 else text[:97] + "..."


def difference(old: RunConfig, new: RunConfig) -> list[tuple[str, Any, Any]]:
    """(path, old value, new value) wherever two recipes differ."""
    found: list[tuple[str, Any, Any]] = []

    def walk(a: Any, b: Any, path: str) -> None:
        if isinstance(a, dict) and isinstance(b, dict):
            for key in {**a, **b}:
                walk(a.get(key), b.get(key), _join(path, key))
        elif isinstance(a, list) and isinstance(b, list) and path == "stages":
            for i in range(max(len(a), len(b))):
                walk(a[i] if i < len(a) else None, b[i] if i < len(b) else None, f"stages[{i}]")
        elif a != b:
            found.append((path, a, b))

    walk(_plain(as_dict(old)), _plain(as_dict(new)), "")
    return found
