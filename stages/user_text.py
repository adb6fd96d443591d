"""Text of the user's own: files, folders, lines of JSON and hub datasets. What of a folder is not read is said."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import fail
from .config import DataConfig

LINES = (".jsonl", ".ndjson")
READ = (".txt", ".md", *LINES)
# of what else a folder holds, so many kinds are named
KINDS = 8
# a single file may have any suffix but these: packed, or records in another format
OTHER = (".json", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".bz2", ".xz", ".zst", ".zip")


@dataclass(frozen=True)
class Document:
    """One text, or one conversation; the id is stable and names its source."""

    text: str
    source: str
    id: str
    messages: tuple[dict[str, str], ...] | None = None


def documents_of(path: Path, config: DataConfig, note: Callable[[str], None]) -> Iterable[Document]:
    """Documents of one file, or of all text in a folder.

    Raises:
        ValueError: a file that is no UTF-8, a line without text, a format that is not read, a folder without text.
    """
    for file in _text_files(path, note) if path.is_dir() else [path]:
        if file.suffix.lower() in OTHER:
            rule = f"a file of records is read as lines of JSON ({' or '.join(LINES)})"
            raise fail("data.sources", rule, str(file), "Unpack or convert the file.")
        try:
            # editors of Windows begin a file with a mark that is no text
            content = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise fail(
                "data.sources", "must be readable UTF-8 text", f"{file} ({error})", "Convert the file."
            ) from error
        key = path.name if file == path else f"{path.name}/{file.relative_to(path).as_posix()}"
        if file.suffix.lower() in LINES:
            yield from _lines(file, content, path.name, key, config)
        else:
            yield Document(content, path.name, key)


def _text_files(folder: Path, note: Callable[[str], None]) -> list[Path]:
    """The files of a folder that are read; how many of which kind are not is noted."""
    files, others = [], Counter[str]()
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            # rglob enters no links, which may lead in a circle
            others["linked folders"] += path.is_symlink()
        elif path.suffix.lower() in READ:
            files.append(path)
        else:
            others[path.suffix or "no suffix"] += 1
    kinds = [f"{kind} ({count})" for kind, count in others.most_common() if count]
    skipped = ", ".join([*kinds[:KINDS], "..."] if len(kinds) > KINDS else kinds)
    if not files:
        rule = f"a folder must hold files with a suffix of {', '.join(READ)}"
        got = f"0 in {folder.name}" + (f" beside {skipped}" if skipped else "")
        raise fail("data.sources", rule, got, "Add text, or rename or convert the files.")
    if skipped:
        note(f"data: not read in {folder}: {skipped}")
    return files


def _lines(file: Path, content: str, source: str, key: str, config: DataConfig) -> Iterable[Document]:
    # splitlines would also cut at U+2028 and its like, which JSON strings may hold
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise fail(where, "must be a JSON object", str(error), "Mend that line.") from error
        yield _record(record, where, source, f"{key}:{number}", config)


def _record(record: Any, where: str, source: str, key: str, config: DataConfig) -> Document:
    if isinstance(record, dict) and isinstance(record.get("messages"), list):
        messages = tuple(record["messages"])
        if not all(isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in messages):
            raise fail(where, "a message has a role and a text content", str(messages)[:80], "Mend that line.")
        text = "\n".join(m["content"] for m in messages)
        _require_text(json.dumps(messages, ensure_ascii=False), where)
        return Document(text, source, key, messages)
    if not isinstance(record, dict) or not isinstance(record.get(config.text_field), str):
        do = "Set data.text_field to the key that holds it."
        raise fail(where, f"must have text under {config.text_field!r} or 'messages'", str(record)[:80], do)
    _require_text(record[config.text_field], where)
    return Document(record[config.text_field], source, key)


def _require_text(text: str, where: str) -> None:
    """JSON can spell half of a pair of surrogates, which is no character and cannot be written."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        got = f"{text[error.start]!r} after {text[max(0, error.start - 20) : error.start]!r}"
        raise fail(where, "must hold text that UTF-8 can write", got, "Mend that line.") from error


def hub_rows(name: str, config: DataConfig) -> Iterable[Document]:
    """Documents of a data set of the hub, as many as `data.max_tokens` needs.

    Raises:
        ValueError: no package `datasets`, or a row without text.
    """
    try:
        import datasets
    except ImportError as error:
        raise fail(
            "data.sources", "hub datasets need a package", "no 'datasets'", 'Run: pip install "ssmorph[data]"'
        ) from error
    rows = datasets.load_dataset(name, split="train", streaming=config.max_tokens is not None)
    letters = 0
    for number, row in enumerate(rows):
        document = _record(dict(row), f"hub:{name}[{number}]", f"hub:{name}", f"{name}:{number}", config)
        yield document
        letters += len(document.text)
        # about five letters a token: enough text for the limit and the held-out share
        if config.max_tokens is not None and letters > 8 * config.max_tokens:
            break
