"""Where text comes from: the default corpus found in installed packages, local files, chat logs, hub datasets.

Held-out documents are chosen by the hash of their id, so they never move when others are added. Near-duplicates, which
share more than a third of their eight-word shingles with a document kept before, are removed from all sets.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import fail, nearest
from .config import DataConfig
from .packages import DOMAIN, SOURCES
from .user_text import Document, documents_of, hub_rows

SHINGLE = 8
DUPLICATE_SHARE = 1 / 3
# every how many-th shingle is remembered, by its hash
SAMPLE = 8
# fewer texts than this are cut into parts, so that some can be held out
FEWEST = 4
PART = 8192
# text that is held out is at most this many times data.heldout_percent, or this share, before a user's texts are cut
TIMES, MOST = 2, 0.1
# letters of the smallest part they are then cut into: less is a sentence or two
SMALLEST = 512


@dataclass
class Corpus:
    """Documents to train on, documents held out of each source, and a domain that is never trained on.

    `notes` are lines for the user: what of a source was not read.
    """

    train: list[Document] = field(default_factory=list)
    heldout: dict[str, list[Document]] = field(default_factory=dict)
    domain: tuple[str, list[Document]] | None = None
    provenance: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def load_corpus(config: DataConfig, check: Callable[[], None] = lambda: None) -> Corpus:
    """All documents of a recipe's sources. `check` is called for each of them, and may raise to stop.

    Raises:
        ValueError: a missing package or file, an undecodable or empty source, two sources of one name.
    """
    corpus = Corpus()
    seen: set[int] = set()
    licences: dict[str, str] = {}
    for source in config.sources:
        own = source not in {"default", *(s[0] for s in SOURCES)}
        for name, licence, documents in _read(source, config, corpus):
            if name in licences:
                raise fail("data.sources", "sources must have different names", f"{name} twice", "Rename or drop one.")
            licences[name] = licence
            _add(corpus, name, _checked(documents, check), config, seen, own)
    # a user's own text is never cut down
    if licences.keys() <= {name for name, _, _ in SOURCES}:
        _cap(corpus)
    # one order for all machines: documents of different sources come mixed
    corpus.train.sort(key=lambda d: (_hash(d.id), d.id))
    for name, licence in licences.items():
        trained = [d for d in corpus.train if d.source == name]
        corpus.provenance.append(_provenance(name, licence, trained))
    if "default" in config.sources:
        name, licence, read = DOMAIN
        documents = (Document(text, name, f"{name}/{key}") for key, text in read())
        corpus.domain = (name, _distinct(_checked(documents, check), seen))
        corpus.provenance.append(_provenance(name, f"{licence}; never trained on", corpus.domain[1]))
    return corpus


def _read(source: str, config: DataConfig, corpus: Corpus) -> Iterable[tuple[str, str, Iterable[Document]]]:
    chosen = [s for s in SOURCES if source in ("default", s[0])]
    if chosen:
        for name, licence, read in chosen:
            yield name, licence, (Document(text, name, f"{name}/{key}") for key, text in read())
    elif source.startswith("hub:"):
        yield source, "see the dataset's card", hub_rows(source[4:], config)
    else:
        path = Path(source).expanduser()
        if not path.exists():
            do = nearest(str(path), ["default", *(s[0] for s in SOURCES)])
            rule = "a source is 'default', one of its parts, a file, a folder or hub:NAME"
            raise fail("data.sources", rule, str(path), do)
        yield Path(source).name, "the user's own", documents_of(path, config, corpus.notes.append)


def _checked(documents: Iterable[Document], check: Callable[[], None]) -> Iterable[Document]:
    for document in documents:
        check()
        yield document


def _add(corpus: Corpus, name: str, read: Iterable[Document], config: DataConfig, seen: set[int], own: bool) -> None:
    """Splits a source: held out are the lowest hashes, at least two documents, at most half.

    Of a user's `own`, long documents are cut where whole ones would not do.
    """
    documents = _distinct((d for d in read if d.text.strip()), seen)
    if len(documents) < FEWEST and not any(d.messages for d in documents):
        documents = [part for d in documents for part in _parts(d, len(d.text.strip()) // 8)]
    if len(documents) < 2:
        got = f"{len(documents)} in {name}"
        raise fail("data.sources", "a source holds two documents or more that no other repeats", got, "Add documents.")
    heldout, train = _split(documents, config)
    if own and _uneven(heldout, train, config):
        size = max(SMALLEST, int(sum(len(d.text) for d in documents) * MOST / 2))
        heldout, train = _split([part for d in documents for part in _cut(d, size)], config)
    corpus.heldout[name] = heldout
    corpus.train += train


def _split(documents: list[Document], config: DataConfig) -> tuple[list[Document], list[Document]]:
    ranked = sorted(documents, key=lambda d: _hash(d.id))
    below = sum(_hash(d.id) < config.heldout_percent / 100 * 2**64 for d in ranked)
    count = min(max(2, below), len(ranked) // 2)
    return ranked[:count], ranked[count:]


def _uneven(heldout: list[Document], train: list[Document], config: DataConfig) -> bool:
    """Whether far more text is held out than was asked for, or one document has more of it than all others."""
    sizes, total = [len(d.text) for d in heldout], sum(len(d.text) for d in [*heldout, *train])
    largest = max(len(d.text) for d in [*heldout, *train])
    return sum(sizes) > total * max(TIMES * config.heldout_percent / 100, MOST) or 2 * largest > total


def _cut(document: Document, size: int) -> list[Document]:
    """A text in parts, unless it is about as short as one; a conversation stays whole."""
    return [document] if document.messages or len(document.text) <= 2 * size else _parts(document, size)


def _provenance(name: str, licence: str, documents: list[Document]) -> dict[str, Any]:
    return {"source": name, "licence": licence, "documents": len(documents), "bytes": sum(map(_size, documents))}


def _size(document: Document) -> int:
    return len(document.text.encode()) if document.messages is None else len(json.dumps(document.messages))


def _parts(document: Document, size: int) -> list[Document]:
    """A text cut at paragraphs, else at lines, else at spaces, into parts of about `size` letters, 8 kB at most."""
    parts, rest = [], document.text.strip()
    size = max(1, min(PART, size))
    while rest:
        found = (rest.find(mark, size // 2, 2 * size) for mark in ("\n\n", "\n", " "))
        end = next((at for at in found if at > 0), size) if len(rest) > size else len(rest)
        parts.append(rest[:end].strip())
        rest = rest[end:].strip()
    return [Document(text, document.source, f"{document.id}#{i}") for i, text in enumerate(parts)]


def _cap(corpus: Corpus) -> None:
    """Of three or more sources none trains on more text than the others together: its last hashes are dropped."""
    sizes: dict[str, int] = {}
    for d in corpus.train:
        sizes[d.source] = sizes.get(d.source, 0) + _size(d)
    if len(sizes) < 3:
        return
    largest = max(sizes, key=lambda name: sizes[name])
    excess, dropped = 2 * sizes[largest] - sum(sizes.values()), set()
    for d in sorted((d for d in corpus.train if d.source == largest), key=lambda d: _hash(d.id), reverse=True):
        if excess <= 0:
            break
        dropped.add(d.id)
        excess -= _size(d)
    corpus.train = [d for d in corpus.train if d.id not in dropped]


def _distinct(documents: Iterable[Document], seen: set[int]) -> list[Document]:
    kept = []
    for document in documents:
        marks = _marks(document.text)
        if len(marks & seen) <= DUPLICATE_SHARE * len(marks):
            kept.append(document)
            seen |= marks
    return kept


def _marks(text: str) -> set[int]:
    """Hashes of a fixed sample of the text's shingles: the same shingle is in every text's sample or in none."""
    words = re.findall(r"\w+", text.lower()) or [text]
    shingles = (" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1)))
    hashes = {int.from_bytes(hashlib.blake2b(s.encode(), digest_size=8).digest(), "big") for s in shingles}
    # a text too short to be sampled is known by all its shingles, or its exact copies would stay
    return {h for h in hashes if h % SAMPLE == 0} or hashes


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
