"""Text of the user's own: nothing of it is lost in silence, and nothing held out is trained on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ssmorph.convert.tiny import byte_tokenizer
from ssmorph.stages.config import DataConfig
from ssmorph.stages.corpus import Corpus
from ssmorph.stages.data import PackedData, open_or_pack, tokenizer_hash

from .test_corpus import TEMPLATE, folder_of, load, words


def pack(config: DataConfig, folder: Path, tokenizer: Any) -> PackedData:
    return open_or_pack(config, tokenizer, folder, lambda _line: None)


def test_a_source_called_train_is_not_taken_for_the_training_set(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "train", 20)
    packed = pack(DataConfig(sources=(str(folder),), window=32), tmp_path / "packed", byte_tokenizer())
    assert packed.train_tokens == sum(len(d.text) + 1 for d in load(folder).train)
    assert packed.heldout_names() == ["train"]


def test_two_sources_of_one_name_are_refused(tmp_path: Path) -> None:
    for parent in ("a", "b"):
        (tmp_path / parent).mkdir()
        (tmp_path / parent / "notes.txt").write_text(words(ord(parent), 400))
    with pytest.raises(ValueError, match=r"notes\.txt twice"):
        load(tmp_path / "a" / "notes.txt", tmp_path / "b" / "notes.txt")


@pytest.mark.parametrize("joint", ["\n\n", "\n", " "])
@pytest.mark.parametrize("count", [1, 3])
def test_few_documents_are_cut_so_that_some_text_is_held_out(tmp_path: Path, joint: str, count: int) -> None:
    (tmp_path / "few").mkdir()
    for seed in range(count):
        (tmp_path / "few" / f"{seed}.txt").write_text(words(seed, 500).replace(" ", joint))
    corpus = load(tmp_path / "few")
    held = corpus.heldout["few"]
    assert len(held) >= 2
    together = Counter(word for d in [*corpus.train, *held] for word in d.text.split())
    assert together == Counter(word for seed in range(count) for word in words(seed, 500).split())


def share_held_out(corpus: Corpus) -> float:
    held = sum(len(d.text) for documents in corpus.heldout.values() for d in documents)
    return held / (held + sum(len(d.text) for d in corpus.train))


@pytest.mark.parametrize("lengths", [(2000, 40, 40, 40), (2000, 900, 40, 40, 40), (600,) * 5, (900, *(100,) * 12)])
def test_no_long_document_is_held_out_as_a_whole(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    """Whichever of the names hashes lowest."""
    for turn in range(len(lengths)):
        # a folder may have the name of a source of ours
        folder = tmp_path / str(turn) / "speeches"
        folder.mkdir(parents=True)
        for seed, length in enumerate(lengths[turn:] + lengths[:turn]):
            (folder / f"{seed}.txt").write_text(words(seed, length))
        corpus = load(folder)
        assert 0.01 < share_held_out(corpus) < 0.12
        together = Counter(word for d in [*corpus.train, *corpus.heldout["speeches"]] for word in d.text.split())
        assert sum(together.values()) == len(together) == sum(lengths)


def test_conversations_are_never_cut(tmp_path: Path) -> None:
    chats = [[{"role": "user", "content": words(seed, 2000 if seed == 2 else 40)}] for seed in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    corpus = load(tmp_path / "rows.jsonl")
    assert len(corpus.train) + len(corpus.heldout["rows.jsonl"]) == 6


def test_what_of_a_folder_is_not_read_is_said(tmp_path: Path) -> None:
    folder, aside = folder_of(tmp_path / "some", 8), folder_of(tmp_path / "aside", 1)
    for name in ("a.csv", "b.csv", "c.json", "d.csv", "LICENSE", ".hidden"):
        (folder / name).write_text("x")
    (folder / "linked").symlink_to(aside)
    (folder / "notes.md").mkdir()
    (folder / "notes.md" / "SHOUTED.TXT").write_text(words(8))
    (folder / "ROWS.JSONL").write_text(json.dumps({"text": words(9)}))
    (folder / "rows.ndjson").write_text(json.dumps({"text": words(10)}))
    said: list[str] = []
    packed = open_or_pack(DataConfig(sources=(str(folder),), window=32), byte_tokenizer(), tmp_path / "p", said.append)
    assert packed.provenance[0]["documents"] == 9
    assert said[0] == f"data: not read in {folder}: .csv (3), no suffix (2), .json (1), linked folders (1)"


@pytest.mark.parametrize("name", ["rows.json", "rows.CSV", "rows.jsonl.gz", "rows.parquet"])
def test_a_file_of_records_in_another_format_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(words(0, 500))
    with pytest.raises(ValueError, match=r"read as lines of JSON \(\.jsonl or \.ndjson\); got .*rows"):
        load(tmp_path / name)


def test_a_folder_without_text_says_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "a.csv").write_text("x")
    with pytest.raises(ValueError, match=r"suffix of \.txt, \.md, \.jsonl, \.ndjson; got 0 in some beside \.csv \(1\)"):
        load(tmp_path / "some")


@pytest.mark.parametrize("name", ["rows.JSONL", "rows.ndjson"])
def test_lines_of_json_go_by_other_names_and_may_begin_with_a_mark(tmp_path: Path, name: str) -> None:
    rows = "\n".join(json.dumps({"text": words(seed)}) for seed in range(8))
    (tmp_path / name).write_text(rows, "utf-8-sig")
    assert {d.text for d in load(tmp_path / name).train} < {words(seed) for seed in range(8)}


def test_exact_copies_of_short_texts_are_removed(tmp_path: Path) -> None:
    rows = [json.dumps({"text": words(seed, 6 + seed % 9)}) for seed in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows + rows))
    corpus = load(tmp_path / "rows.jsonl")
    assert len(corpus.train) + len(corpus.heldout["rows.jsonl"]) == 60


def test_json_strings_may_hold_any_line_separator(tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"{words(seed)}\u2028\x85end"}, ensure_ascii=False) for seed in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), "utf-8")
    assert len(load(tmp_path / "rows.jsonl").train) == 6


def test_json_lines_of_one_name_in_two_folders_are_different_documents(tmp_path: Path) -> None:
    for number, parent in enumerate(("a", "b")):
        (tmp_path / "all" / parent).mkdir(parents=True)
        rows = [json.dumps({"text": words(100 * number + i)}) for i in range(10)]
        (tmp_path / "all" / parent / "rows.jsonl").write_text("\n".join(rows))
    corpus = load(tmp_path / "all")
    assert len({d.id for d in [*corpus.train, *corpus.heldout["all"]]}) == 20


def test_an_empty_source_beside_a_full_one_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="0 in empty"):
        load(folder_of(tmp_path / "full", 8), tmp_path / "empty")


def test_the_users_text_is_not_cut_down_and_provenance_counts_what_is_trained_on(tmp_path: Path) -> None:
    names = {"big": 60, "x": 8, "y": 8}
    for offset, (name, count) in enumerate(names.items()):
        (tmp_path / name).mkdir()
        for i in range(count):
            (tmp_path / name / f"{i}.txt").write_text(words(1000 * offset + i))
    corpus = load(*(tmp_path / name for name in names))
    trained = Counter(d.source for d in corpus.train)
    assert {name: trained[name] + len(corpus.heldout[name]) for name in names} == names
    assert {p["source"]: p["documents"] for p in corpus.provenance} == trained


def test_a_truncated_loss_shard_is_refused(tmp_path: Path) -> None:
    config = DataConfig(sources=(str(folder_of(tmp_path / "some", 8)),), window=32)
    packed = pack(config, tmp_path / "packed", byte_tokenizer())
    shard = max(packed.folder.glob("*.loss"), key=lambda f: f.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"\.loss"):
        PackedData(packed.folder)


def test_the_tokenizers_hash_sees_rules_and_template_but_not_the_last_call() -> None:
    tokenizer, other = byte_tokenizer(), byte_tokenizer()
    other(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert tokenizer_hash(other) == tokenizer_hash(tokenizer)
    other.chat_template = TEMPLATE
    assert tokenizer_hash(other) != tokenizer_hash(tokenizer)


def test_the_end_of_a_conversation_is_not_an_answer(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    chats = [
        [{"role": r, "content": words(3 * i + j, 5)} for j, r in enumerate(("user", "assistant", "user"))]
        for i in range(8)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    config = DataConfig(sources=(str(tmp_path / "chats.jsonl"),), window=32, loss_on="answers")
    batch = pack(config, tmp_path / "packed", tokenizer).batch(0, 0, 0, 1, 8, 32)
    ends_BL = batch.tokens_BL == tokenizer.eos_token_id
    assert batch.loss_mask_BL.any()
    assert ends_BL.any()
    assert not (ends_BL & batch.loss_mask_BL).any()
