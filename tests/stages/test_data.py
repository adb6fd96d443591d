"""Packed data: what is on disk is the text, batches depend on (seed, step, rank) alone, damage and mismatch are errors.

B batch, L window length, W windows.
"""

from __future__ import annotations

import copy
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from ssmorph import verbs
from ssmorph.convert.tiny import byte_tokenizer
from ssmorph.stages import corpus, data
from ssmorph.stages.config import DataConfig
from ssmorph.stages.context import Interrupted
from ssmorph.stages.corpus import load_corpus
from ssmorph.stages.data import PackedData, open_or_pack
from tests.models import starting_tokenizer

from .tiny_run import run_tiny

L = 32
TOKENIZER = byte_tokenizer()


def text(seed: int, count: int = 25) -> str:
    return " ".join(f"w{seed}x{i}" for i in range(count))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("texts") / "some"
    folder.mkdir()
    for seed in range(20):
        (folder / f"{seed}.txt").write_text(text(seed))
    return DataConfig(sources=(str(folder),), window=L)


@pytest.fixture
def packed(config: DataConfig, tmp_path: Path) -> PackedData:
    return pack(config, tmp_path / "packed")


def pack(config: DataConfig, folder: Path, tokenizer: Any = TOKENIZER) -> PackedData:
    return open_or_pack(config, tokenizer, folder, lambda _line: None)


def epoch(packed: PackedData, seed: int, steps: range, batch: int = 1) -> torch.Tensor:
    return torch.cat([packed.batch(seed, step, 0, 1, batch, L).tokens_BL for step in steps])


def test_windows_are_pieces_of_the_documents_joined_by_end_of_text(config: DataConfig, packed: PackedData) -> None:
    loaded = load_corpus(config)
    whole = "".join(d.text + TOKENIZER.eos_token for d in loaded.train)
    assert packed.train_tokens == sum(len(d.text.encode()) + 1 for d in loaded.train)
    batch = packed.batch(0, 5, 0, 1, 4, L)
    assert batch.tokens_BL.dtype == torch.int64
    assert batch.loss_mask_BL.dtype == torch.bool
    assert batch.tokens_BL.shape == batch.loss_mask_BL.shape == (4, L)
    assert all(TOKENIZER.decode(row) in whole for row in batch.tokens_BL)
    held = " ".join(d.text for d in loaded.heldout["some"])
    assert not any(TOKENIZER.decode(row) in held for row in batch.tokens_BL)


@pytest.mark.parametrize("world", [2, 3, 6])
def test_ranks_together_see_what_one_process_sees(packed: PackedData, world: int) -> None:
    for step in (0, 7, 40, 400):
        alone = packed.batch(3, step, 0, 1, 6, L)
        ranks = [packed.batch(3, step, rank, world, 6 // world, L) for rank in range(world)]
        assert torch.equal(torch.cat([r.tokens_BL for r in ranks]), alone.tokens_BL)
        assert torch.equal(torch.cat([r.loss_mask_BL for r in ranks]), alone.loss_mask_BL)


def test_a_batch_depends_on_nothing_that_was_asked_before(config: DataConfig, packed: PackedData) -> None:
    straight = epoch(packed, 1, range(60), 2)
    again = PackedData(packed.folder)
    again.batch(9, 1000, 0, 1, 2, L)
    assert torch.equal(epoch(again, 1, range(40, 60), 2), straight[80:])


def test_an_epoch_visits_each_window_once_and_the_next_cuts_elsewhere(packed: PackedData) -> None:
    count = packed.train_tokens // L - 1
    first, second = epoch(packed, 0, range(count)), epoch(packed, 0, range(count, 2 * count))
    assert len(first.unique(dim=0)) == count
    assert not {tuple(r.tolist()) for r in first} & {tuple(r.tolist()) for r in second}
    assert not torch.equal(first, epoch(packed, 1, range(count)))


def test_max_tokens_limits_training_alone(config: DataConfig, packed: PackedData, tmp_path: Path) -> None:
    short = pack(DataConfig(sources=config.sources, window=L, max_tokens=300), tmp_path / "short")
    assert short.train_tokens == 300
    assert torch.equal(short.heldout_windows("some", L, 999), packed.heldout_windows("some", L, 999))


def test_training_needs_a_token_more_than_a_window(config: DataConfig, packed: PackedData, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"max_tokens: must be larger than the window of 32 tokens; got 32\. Raise it"):
        DataConfig(sources=config.sources, window=L, max_tokens=L)
    assert pack(DataConfig(sources=config.sources, window=L, max_tokens=L + 1), tmp_path / "p").train_tokens == L + 1
    count = packed.train_tokens
    with pytest.raises(ValueError, match=rf"must hold more than a window of {count} tokens .* got {count} tokens"):
        pack(DataConfig(sources=config.sources, window=count), tmp_path / "q")
    with pytest.raises(ValueError, match=rf"must be less than the {count} training tokens; got {count}"):
        pack(DataConfig(sources=config.sources, window=count), packed.folder)


def test_held_out_windows_hold_the_held_out_text(config: DataConfig, packed: PackedData) -> None:
    assert packed.heldout_names() == ["some"]
    assert packed.domain_name is None
    whole = "".join(d.text + TOKENIZER.eos_token for d in load_corpus(config).heldout["some"])
    windows_WL = packed.heldout_windows("some", L, 10_000)
    assert windows_WL.dtype == torch.int64
    assert len(windows_WL) >= 2
    assert all(TOKENIZER.decode(row) in whole for row in windows_WL)
    assert whole.startswith(TOKENIZER.decode(windows_WL[0]))
    assert torch.equal(packed.heldout_windows("some", L, 2 * L), windows_WL[:2])


def test_a_corpus_shorter_than_a_window_is_refused(config: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="window of 99999 tokens"):
        pack(DataConfig(sources=config.sources, window=99_999), tmp_path / "packed")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("shard", ["0.tokens", "0.loss"])
def test_a_disk_that_fills_while_packing_is_named(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: str
) -> None:
    original = Path.open

    def full(path: Path, *args: Any, **options: Any) -> Any:
        return original(Path("/dev/full") if path.name == shard else path, *args, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(ValueError, match="the disk must have room"):
        pack(config, tmp_path / "packed")
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_shard_is_refused(config: DataConfig, packed: PackedData) -> None:
    shard = max(packed.folder.glob("*.tokens"), key=lambda f: f.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(ValueError, match="bytes"):
        PackedData(packed.folder)


def test_a_folder_that_is_no_packed_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(ValueError, match="must be packed data"):
        PackedData(tmp_path)


@pytest.mark.parametrize("index", [None, "[]", '{"pages": 3}'])
def test_nobody_is_told_to_delete_a_folder_that_holds_something_else(
    config: DataConfig, tmp_path: Path, index: str | None
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    if index is not None:
        (tmp_path / "mine" / "index.json").write_text(index)
    with pytest.raises(ValueError, match=r"must be packed data.* Name another folder, or move this one away\."):
        pack(config, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"


def test_a_file_in_the_place_of_packed_data_stays(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ValueError, match="must be a folder of packed data, or new; got a file"):
        pack(config, tmp_path / "mine")
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine").read_text() == "mine"


def test_packing_again_says_that_nothing_was_read(config: DataConfig, tmp_path: Path) -> None:
    said: list[str] = []
    first, second = (
        verbs.pack(tmp_path / "p", "tiny-random-llama", *config.sources, say=said.append) for _ in range(2)
    )
    assert first == second
    assert [("nothing was read again" in line) for line in said] == [False, True]


def test_windows_begin_with_the_start_token_where_the_tokenizer_has_one(
    config: DataConfig, packed: PackedData, tmp_path: Path
) -> None:
    tokenizer = starting_tokenizer()
    start, begun = tokenizer.bos_token_id, pack(config, tmp_path / "begun", tokenizer)
    for found, bare in (
        (epoch(begun, 3, range(9), 2), epoch(packed, 3, range(9), 2)),
        (begun.heldout_windows("some", L, 256), packed.heldout_windows("some", L, 256)),
    ):
        assert (found[:, 0] == start).all()
        assert (bare[:, 0] != start).all()
        assert torch.equal(found[:, 1:], bare[:, 1:])
    assert torch.equal(begun.heldout_windows("some", L, 256, raw=True), packed.heldout_windows("some", L, 256))
    assert begun.train_hash() != packed.train_hash()
    # what an earlier version packed has no note of it
    index = json.loads((begun.folder / "index.json").read_text())
    del index["start"]
    (begun.folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="start token"):
        pack(config, begun.folder, tokenizer)


def test_another_tokenizer_or_other_data_are_refused(config: DataConfig, packed: PackedData, tmp_path: Path) -> None:
    other = copy.deepcopy(TOKENIZER)
    other.add_tokens(["ssm"])
    with pytest.raises(ValueError, match="tokenizer"):
        pack(config, packed.folder, other)
    with pytest.raises(ValueError, match="other settings"):
        pack(DataConfig(sources=config.sources, window=L, heldout_percent=9), packed.folder)
    assert pack(DataConfig(sources=config.sources, window=16), packed.folder).train_tokens == packed.train_tokens


@pytest.mark.parametrize("place", ["data.encode", "corpus._marks"])
def test_sigterm_stops_packing_at_the_next_document(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    module, name = ({"data": data, "corpus": corpus}[place.split(".")[0]], place.split(".")[1])
    original, calls = getattr(module, name), []

    def signalled(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(module, name, signalled)
    with pytest.raises(Interrupted, match="SIGTERM"):
        run_tiny(tmp_path / "run", f"data.sources=[{config.sources[0]}]", "data.window=32")
    assert len(calls) == 1
    assert not (tmp_path / "run" / "data").exists()
    assert list((tmp_path / "run").glob(".partial-*")) == []


def test_a_kill_while_packing_leaves_no_folder(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ssmorph.stages.data._key", killed)
    with pytest.raises(KeyboardInterrupt):
        pack(config, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
