"""One flat Python file that loads a hybrid without this package: transformers runs it where it may trust remote code.

It is made of our own sources: of the modules below, in this order, the top-level statements that the two classes reach.
All share one namespace there, so a name that means two things, or nothing, stops the save.
"""

from __future__ import annotations

import ast
import builtins
import functools
import importlib.util
import symtable
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ssmorph import __version__

STEM = "modeling_ssmorph"
AUTO_MAP = {"AutoConfig": f"{STEM}.SsmorphConfig", "AutoModelForCausalLM": f"{STEM}.SsmorphForCausalLM"}
ROOTS = ("SsmorphConfig", "SsmorphForCausalLM")
# what is needed first comes first; plain_ops stands for the packages that choose between backends
MODULES = (
    "ssmorph.errors",
    "ssmorph.kernels.ssd.chunked",
    "ssmorph.kernels.ssd.plain",
    "ssmorph.kernels.conv.chunked",
    "ssmorph.kernels.norm.chunked",
    "ssmorph.kernels.common.rope",
    "ssmorph.kernels.window_step.plain",
    "ssmorph.convert.plain_ops",
    "ssmorph.convert.window",
    "ssmorph.convert.rope",
    "ssmorph.convert.keys",
    "ssmorph.convert.cache",
    "ssmorph.convert.mixers.base",
    "ssmorph.convert.mixers.mamba2",
    "ssmorph.convert.mixers.discrete_mamba2",
    "ssmorph.convert.mixers.attending",
    "ssmorph.convert.mixers.windowed",
    "ssmorph.convert.mixers.heads",
    "ssmorph.convert.mixers",
    "ssmorph.convert.modeling",
)
HEADER = f'''# SPDX-License-Identifier: Apache-2.0
# Written by ssmorph {__version__} from its own sources; not meant to be edited.
"""Loads this hybrid where ssmorph is not installed: from_pretrained(folder, trust_remote_code=True).

Needs torch and transformers only, and runs plain torch: slower than the package, which has kernels for CPUs and GPUs
(`import ssmorph.hf`, then from_pretrained(folder)).
"""

from __future__ import annotations
'''


@dataclass(frozen=True)
class Statement:
    """A top-level statement: where it is from, its text, the names it defines and those it mentions."""

    module: str
    text: str
    defines: frozenset[str]
    mentions: frozenset[str]
    is_import: bool


def write_bundle(folder: Path) -> dict[str, str]:
    """Writes the bundle into `folder`; the `auto_map` that makes transformers find it."""
    (folder / f"{STEM}.py").write_text(_packaged(), encoding="utf-8")
    return dict(AUTO_MAP)


@functools.cache
def _packaged() -> str:
    return bundle({module: _source(module) for module in MODULES}, ROOTS)


def bundle(sources: dict[str, str], roots: tuple[str, ...]) -> str:
    """The flat file: of `sources` (dotted name to text, in order) what `roots` reach.

    Raises:
        AssertionError: a name is defined twice or nowhere, or a statement cannot be moved.
    """
    statements = [s for module, text in sources.items() for s in _statements(module, text)]
    defined: dict[str, Statement] = {}
    clashes: dict[str, set[str]] = {}
    for s in statements:
        for name in s.defines:
            first = defined.setdefault(name, s)
            if first is not s and not (first.is_import and s.text == first.text):
                clashes.setdefault(name, {first.module}).add(s.module)
    reached: set[str] = set()
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        assert name not in clashes, f"bundle: {name} means two things, in {sorted(clashes[name])}; rename one"
        if name in defined and name not in reached:
            reached.add(name)
            waiting += defined[name].mentions | defined[name].defines
    kept = [s for s in statements if s.defines & reached]
    imports = sorted({s.text for s in kept if s.is_import}, key=_import_order)
    text = "\n".join([HEADER, *imports, "\n", "\n\n\n".join(_sections(kept, sources)), ""])
    check(text)
    return text


def check(text: str) -> None:
    """Raises AssertionError where the file imports ours, or mentions a global name that it does not define."""
    inner = sorted(name for node in ast.walk(ast.parse(text)) for name in _ours(node))
    assert not inner, f"bundle: imports of ours are left: {inner}"
    top = symtable.symtable(text, f"{STEM}.py", "exec")
    known = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()}
    known |= {*dir(builtins), "__name__", "__file__"}
    missing = {name for name in _globals(top) if name not in known}
    assert not missing, f"bundle: nothing defines {sorted(missing)}"


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    text = spec.loader.get_source(module)  # type: ignore[union-attr]
    assert isinstance(text, str), f"bundle: {module} has no source"
    return text


def _statements(module: str, text: str) -> Iterator[Statement]:
    """What may be moved; imports of ours are left behind."""
    lines = text.splitlines()
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from _import(module, node)
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign):
            raise AssertionError(f"bundle: cannot move line {node.lineno} of {module}")
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
        while first > 1 and lines[first - 2].startswith("#"):
            first -= 1
        mentions = frozenset(n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load))
        yield Statement(module, "\n".join(lines[first - 1 : node.end_lineno]), _defines(node), mentions, False)


def _defines(node: ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign) -> frozenset[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return frozenset({node.name})
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return frozenset(n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name))


def _import(module: str, node: ast.Import | ast.ImportFrom) -> Iterator[Statement]:
    """One statement for each imported name; none for ours, whose names the bundle defines itself."""
    if _ours(node):
        renamed = [a.asname for a in node.names if a.asname not in (None, a.name)]
        assert isinstance(node, ast.ImportFrom), f"bundle: {module} imports a module of ours whole"
        assert not renamed, f"bundle: {module} renames {renamed}"
        return
    for alias in node.names:
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            continue
        name = alias.asname or alias.name.split(".")[0]
        single = ast.ImportFrom(node.module, [alias], 0) if isinstance(node, ast.ImportFrom) else ast.Import([alias])
        yield Statement(module, ast.unparse(single), frozenset({name}), frozenset(), True)


def _ours(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        name = node.module or ""
        return [name or "."] if node.level or name.split(".")[0] == "ssmorph" else []
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    return [name for name in names if name.split(".")[0] == "ssmorph"]


def _import_order(text: str) -> tuple[bool, str]:
    return text.split()[1].split(".")[0] in {"torch", "transformers"}, text


def _sections(kept: list[Statement], sources: dict[str, str]) -> Iterator[str]:
    """The statements, each module's under its name and what its docstring says, as comments."""
    last = ""
    for s in kept:
        if s.is_import:
            continue
        if s.module != last:
            said = ast.get_docstring(ast.parse(sources[s.module])) or ""
            lines = [f"--- {s.module} ---", "", *said.splitlines()]
            yield "\n".join(f"# {line}".rstrip() for line in lines)
            last = s.module
        yield s.text


def _globals(table: symtable.SymbolTable) -> Iterator[str]:
    """Global names that are read, in this scope and those inside."""
    is_global: Callable[[symtable.Symbol], bool] = (
        symtable.Symbol.is_referenced if table.get_type() == "module" else symtable.Symbol.is_global
    )
    yield from (s.get_name() for s in table.get_symbols() if is_global(s))
    for child in table.get_children():
        yield from _globals(child)
