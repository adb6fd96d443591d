"""The corpus: what the default one promises, how documents are held out, chat data, and errors a user can cause."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ssmorph.convert.tiny import byte_tokenizer
from ssmorph.stages import packages
from ssmorph.stages.chat import encode
from ssmorph.stages.config import DataConfig
from ssmorph.stages.corpus import Corpus, Document, load_corpus
from ssmorph.stages.wikitext import plain

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}|{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHAT = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo é"}, {"role": "user", "content": "so"})


def words(seed: int, count: int = 60) -> str:
    """Text that shares no run of words with that of another seed."""
    return " ".join(f"w{seed}x{i}" for i in range(count))


def folder_of(path: Path, count: int) -> Path:
    path.mkdir()
    for seed in range(count):
        (path / f"{seed}.txt").write_text(words(seed))
    return path


def load(*sources: object, **changes: Any) -> Corpus:
    return load_corpus(DataConfig(sources=tuple(map(str, sources)), **changes))


def words_of(document: Document) -> set[str]:
    tokens = document.text.lower().split()
    return {" ".join(tokens[i : i + 12]) for i in range(0, max(1, len(tokens) - 12))}


@pytest.mark.slow
def test_the_default_corpus_keeps_its_promises() -> None:
    corpus = load_corpus(DataConfig())
    sizes: dict[str, int] = {}
    for document in corpus.train:
        sizes[document.source] = sizes.get(document.source, 0) + len(document.text.encode())
    assert sum(sizes.values()) >= 5_000_000
    assert len(sizes) >= 3
    assert max(sizes.values()) <= sum(sizes.values()) / 2
    assert all(len(corpus.heldout[name]) >= 2 for name in sizes)
    trained = set().union(*(words_of(d) for d in corpus.train))
    for document in (d for documents in corpus.heldout.values() for d in documents):
        assert len(words_of(document) & trained) < len(words_of(document)) / 2, document.id
    assert corpus.domain is not None
    assert corpus.domain[0] not in sizes
    seen = [d.id for d in corpus.domain[1] if len(words_of(d) & trained) >= len(words_of(d)) / 2]
    assert seen == []


def test_held_out_documents_stay_when_others_are_added(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "some", 60)
    before = {d.id for d in load(folder, heldout_percent=20).heldout["some"]}
    for seed in range(60, 120):
        (folder / f"{seed}.txt").write_text(words(seed))
    after = {d.id for d in load(folder, heldout_percent=20).heldout["some"]}
    assert before < after


def test_at_least_two_documents_are_held_out_and_none_is_trained_on(tmp_path: Path) -> None:
    corpus = load(folder_of(tmp_path / "some", 12), heldout_percent=0.001)
    held = {d.id for d in corpus.heldout["some"]}
    assert len(held) == 2
    assert len(corpus.train) == 10
    assert held.isdisjoint(d.id for d in corpus.train)
    assert corpus.domain is None


def test_near_duplicates_are_removed(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "some", 8)
    (folder / "excerpt.txt").write_text(" ".join(words(3).split()[10:50]) + " and an end of its own")
    corpus = load(folder)
    assert len(corpus.train) + len(corpus.heldout["some"]) == 8


def test_json_lines_hold_text_or_conversations(tmp_path: Path) -> None:
    rows = [{"body": words(i)} for i in range(8)]
    rows += [{"messages": [{"role": "user", "content": words(i)}]} for i in range(8, 16)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    corpus = load(tmp_path / "rows.jsonl", text_field="body")
    everything = [*corpus.train, *corpus.heldout["rows.jsonl"]]
    assert sum(d.messages is None for d in everything) == 8
    assert sum(d.messages is not None for d in everything) == 8


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ('{"text": "a b"}\n{bad\n', "rows.jsonl:2"),
        ('{"txt": "a"}', "rows.jsonl:1"),
        ('{"messages": [3]}', "rows.jsonl:1"),
        ('{"text": "a b"}\n{"text": "x \\ud83d y"}', r"rows.jsonl:2: must hold .* got '\\ud83d' after 'x '"),
        ('{"messages": [{"role": "user", "content": "\\ud83d"}]}', "rows.jsonl:1"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, content: str, where: str) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(ValueError, match=where):
        load(tmp_path / "rows.jsonl")


def test_missing_undecodable_and_empty_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        load(tmp_path / "nowhere")
    (tmp_path / "latin.txt").write_bytes("né".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt"):
        load(tmp_path / "latin.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        load(tmp_path / "empty")


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda _name: None)
    with pytest.raises(ValueError, match="pip install --no-deps gensim==") as caught:
        load("default")
    assert "package gensim" in str(caught.value)


def test_wiki_markup_becomes_prose() -> None:
    markup = (
        "{{Infobox|a={{b|c}}}}'''Tin''' is a [[Metal (matter)|metal]]<ref name=x>see [[y]]</ref>.\n"
        "{| class=wikitable\n| cell\n|}\n[[File:tin.jpg|thumb|A [[lump]] of it]]\n"
        "== Use ==\nIn [[solder]] &amp; pewter.\n== References ==\n* [http://a.b c]"
    )
    assert plain(markup).split("\n") == ["Tin is a metal.", "", "Use", "In solder & pewter."]


def test_loss_on_answers_marks_the_answers_and_their_end() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    encoded = encode(Document("", "s", "s/1", CHAT), tokenizer, "answers")
    assert tokenizer.decode(encoded.tokens) == "[user]hi|[assistant]yo é|[user]so|"
    assert tokenizer.decode([t for t, on in zip(encoded.tokens, encoded.loss, strict=True) if on]) == "yo é|"
    assert all(encode(Document("", "s", "s/1", CHAT), tokenizer, "all").loss)


def test_chat_data_needs_a_template_that_only_appends() -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match="chat template"):
        encode(Document("", "s", "s/1", CHAT), tokenizer, "all")
    tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(ValueError, match="only appends"):
        encode(Document("", "s", "s/1", CHAT), tokenizer, "answers")
