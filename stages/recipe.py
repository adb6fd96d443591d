"""Reads a recipe into the dataclass tree, strictly: every mistake is named by its path, what came, and the nearest known name.

Standard library and PyYAML only.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from ..errors import UserError, fail, nearest
from .config import STAGES, RunConfig, as_dict


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Safe YAML that refuses a key written twice."""


def _mapping(loader: Any, node: Any) -> dict:
    keys = [key.value for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise fail(f"line {node.start_mark.line + 1}", "a key stands once", repr(key), "Remove one of them.")
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def load_recipe(path: str | Path, overrides: Sequence[str] = (), **top: Any) -> RunConfig:
    """The recipe of a YAML file, with `a.b=value` overrides and top-level keys replaced.

    `base: other.yaml`, relative to the file, is read first and merged under it; a list replaces a list. Stages are
    addressed by kind or index: `stages.logits.optim.lr=1e-4`.

    Raises:
        ValueError: anything the recipe alone shows to be wrong.
    """
    tree = _read(Path(path))
    base = tree.pop("base", None)
    if base is not None:
        below = _read(Path(path).parent / str(base))
        if "base" in below:
            raise fail(f"{path}: base", "a base has no base of its own", base, "Write the shared part into one file.")
        tree = _merge(below, tree)
    for key, value in top.items():
        if value is not None:
            tree[key] = value
    for override in overrides:
        _override(tree, override)
    return build(tree)


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
    try:
        tree = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise fail(str(path), "must be valid YAML", str(error).replace("\n", " "), "Mend that line.") from error
    if not isinstance(tree, dict):
        raise fail(str(path), "a recipe is a mapping", type(tree).__name__, "Start with 'teacher:'.")
    return tree


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = _merge(below[key], value) if both else value
    return merged


def _override(tree: dict[str, Any], text: str) -> None:
    path, separator, value = text.partition("=")
    if not separator:
        raise fail(text, "an override is written path=value", repr(text), "For example seed=1.")
    here: Any = tree
    *parents, last = path.removeprefix("--").split(".")
    for depth, key in enumerate(parents):
        here = _child(here, key, ".".join(parents[: depth + 1]))
    parsed = yaml.load(value, _Loader)
    if isinstance(here, list):
        here[_stage_index(here, last, path)] = parsed
    else:
        here[last] = parsed


def _child(here: Any, key: str, path: str) -> Any:
    if isinstance(here, list):
        return here[_stage_index(here, key, path)]
    if not isinstance(here, dict):
        raise fail(path, "has nothing below it", key, "Check the path of the override.")
    if key == "stages" and key not in here:
        raise fail(path, "the recipe lists its stages before one is changed", key, "Write the stages into the recipe.")
    return here.setdefault(key, {})


def _stage_index(stages: list, key: str, path: str) -> int:
    if key.isdigit() and int(key) < len(stages):
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
        where = f"{path}: " if path and not str(error).startswith(path) else ""
        raise UserError(f"{where}{error}") from error


def _union(value: Any, kinds: tuple, path: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    if all(dataclasses.is_dataclass(k) for k in kinds):
        tag = value.get("kind") if isinstance(value, dict) else None
        if tag not in STAGES:
            raise fail(f"{path}.kind", "must be a kind of stage", repr(tag), nearest(str(tag), STAGES))
        return _convert(value, STAGES[tag], path)
    kinds = tuple(k for k in kinds if k is not type(None))
    chosen = next((k for k in kinds if (get_origin(k) is tuple) == isinstance(value, (list, tuple))), kinds[0])
    return _convert(value, chosen, path)


def _literal(value: Any, choices: tuple, path: str) -> Any:
    if value not in choices or isinstance(value, bool):
        raise fail(path, f"must be one of {', '.join(map(str, choices))}", _show(value), nearest(str(value), map(str, choices)))
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
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str):
        # YAML 1.1 reads 1e-4 as text
        try:
            return float(value)
        except ValueError:
            pass
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    raise fail(path, f"must be {names.get(kind, kind.__name__)}", _show(value), "Check the value.")


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _show(value: Any) -> str:
    return f"{value!r} ({type(value).__name__})"


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
