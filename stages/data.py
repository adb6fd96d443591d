"""Packed data: token shards on disk, mapped into memory, and batches that are a pure function of (seed, step, rank).

Documents are joined with an end-of-text token between them. Where the tokenizer puts a start token before a text, every
window begins with it, in the place of its first token: some models are lost without it (benchmarks/start_token.py). The
data cursor is one integer, the step, so resuming is exact at any world size.

B batch, L window length, W windows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import fail
from .chat import encode, start_tokens
from .config import DataConfig
from .corpus import Corpus, load_corpus
from .rundir import atomic_folder, file_hash
from .user_text import Document

INDEX = "index.json"
KEYS = {"dtype", "tokenizer", "config", "domain", "provenance", "train", "heldout"}


class TokenBatch(NamedTuple):
    """Tokens [B, L] int64, which of them carry loss [B, L] bool, and the step they are of."""

    tokens_BL: Tensor
    loss_mask_BL: Tensor
    step: int


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash of what packed tokens depend on: vocabulary, merges, normalisation, end of text, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {}
    # left behind by the last call, and not used in packing
    rules = {key: value for key, value in rules.items() if key not in ("padding", "truncation")}
    parts = [sorted(tokenizer.get_vocab().items()), rules, tokenizer.eos_token_id, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def open_or_pack(
    config: DataConfig,
    tokenizer: Any,
    folder: Path,
    say: Callable[[str], None],
    check: Callable[[], None] = lambda: None,
) -> PackedData:
    """The packed data of a folder, made on first use. `check` is called for every document, and may raise to stop.

    Raises:
        ValueError: a corpus that is empty or shorter than a window, another tokenizer, a damaged shard, or
            something else in the folder's place.
    """
    if not folder.is_dir():
        if folder.exists():
            raise fail(str(folder), "must be a folder of packed data, or new", "a file", "Name another folder.")
        corpus = load_corpus(config, check)
        for line in corpus.notes:
            say(line)
        with atomic_folder(folder) as partial:
            _pack(corpus, tokenizer, config, partial, check)
        packed = PackedData(folder)
        say(f"data: {packed.train_tokens} training tokens from {len(packed.provenance)} sources")
    packed = PackedData(folder)
    packed.check(tokenizer, config)
    return packed


def _pack(corpus: Corpus, tokenizer: Any, config: DataConfig, folder: Path, check: Callable[[], None]) -> None:
    vocabulary = len(tokenizer)
    dtype = np.uint16 if vocabulary <= 1 << 16 else np.uint32
    heldout = {**corpus.heldout, **(dict([corpus.domain]) if corpus.domain else {})}
    train = _write_set(folder, 0, corpus.train, tokenizer, config, dtype, config.max_tokens, check)
    if train["tokens"] < config.window + 1:
        rule = f"must hold more than a window of {config.window} tokens to train on"
        raise fail("data.sources", rule, f"{train['tokens']} tokens", "Add text.")
    index: dict[str, Any] = {
        "dtype": np.dtype(dtype).name,
        "tokenizer": tokenizer_hash(tokenizer),
        "start": start_tokens(tokenizer),
        "config": _key(config),
        "domain": corpus.domain[0] if corpus.domain else None,
        "provenance": corpus.provenance,
        "train": train,
        "heldout": {
            name: _write_set(folder, number, documents, tokenizer, config, dtype, None, check)
            for number, (name, documents) in enumerate(heldout.items(), start=1)
        },
    }
    (folder / INDEX).write_text(json.dumps(index))


def _write_set(
    folder: Path,
    number: int,
    documents: Iterable[Document],
    tokenizer: Any,
    config: DataConfig,
    dtype: type,
    limit: int | None,
    check: Callable[[], None],
) -> dict[str, Any]:
    """Writes one set document by document, so that no more than one is in memory; returns its entry of the index."""
    end = tokenizer.eos_token_id
    if end is None:
        raise fail("teacher.tokenizer", "must have an end-of-text token", "none", "Use the model's own tokenizer.")
    starts, count = [], 0
    with (folder / f"{number}.tokens").open("wb") as tokens, (folder / f"{number}.loss").open("wb") as losses:
        for document in documents:
            check()
            encoded = encode(document, tokenizer, config.loss_on)
            room = None if limit is None else limit - count
            # a template already ends the last answer; the joint after it is nobody's answer
            closes = document.messages is None or config.loss_on == "all"
            row: np.ndarray = np.asarray([*encoded.tokens, end][:room], dtype=dtype)
            # not tofile: its OSError on a full disk has no errno
            tokens.write(row.tobytes())
            losses.write(np.asarray([*encoded.loss, closes][:room], dtype=np.uint8).tobytes())
            starts.append(count)
            count += len(row)
            if count == limit:
                break
    return {"file": number, "tokens": count, "starts": starts}


def _key(config: DataConfig) -> dict[str, Any]:
    """What the shards depend on; the window is not part of it."""
    return json.loads(json.dumps({k: v for k, v in asdict(config).items() if k != "window"}))


class PackedData:
    """A folder of packed sets: `train`, one held-out set per source, and the held-out domain."""

    def __init__(self, folder: Path) -> None:
        """Opens the folder.

        Raises:
            ValueError: a folder that is no packed data, a shard whose size is not what the index says.
        """
        self.folder = folder
        self._index = _index(folder)
        dtype = np.dtype(self._index["dtype"])
        self._train, self._loss = self._mapped(self._index["train"], dtype)
        pairs = {name: self._mapped(entry, dtype) for name, entry in self._index["heldout"].items()}
        self._heldout = {name: tokens for name, (tokens, _) in pairs.items() if len(tokens)}
        # before start tokens were heeded, the index did not have them
        self._start: list[int] = self._index.get("start", [])
        self.domain_name: str | None = self._index["domain"]
        self.provenance: list[dict[str, Any]] = self._index["provenance"]

    def _mapped(self, entry: dict[str, Any], dtype: np.dtype[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and loss marks of one set, mapped from disk."""
        arrays = []
        for suffix, kind in (("tokens", dtype), ("loss", np.dtype(np.uint8))):
            file, expected = self.folder / f"{entry['file']}.{suffix}", entry["tokens"] * kind.itemsize
            if not file.is_file() or file.stat().st_size != expected:
                got = f"{file.stat().st_size} bytes" if file.is_file() else "no file"
                raise fail(str(file), f"must be {expected} bytes", got, "Delete the folder to pack it again.")
            # an empty file cannot be mapped
            arrays.append(np.memmap(file, dtype=kind, mode="r") if expected else np.empty(0, kind))
        return arrays[0], arrays[1]

    @property
    def train_tokens(self) -> int:
        """Tokens in the training set."""
        return int(self._index["train"]["tokens"])

    def train_hash(self) -> str:
        """A hash of the training set: its tokens, which of them carry loss, and what windows begin with."""
        number = self._index["train"]["file"]
        parts = [file_hash(self.folder / f"{number}.{suffix}") for suffix in ("tokens", "loss")]
        parts += map(str, self._start)
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    def check(self, tokenizer: Any, config: DataConfig) -> None:
        """Raises ValueError if the shards were made by another tokenizer or from other sources."""
        if tokenizer_hash(tokenizer) != self._index["tokenizer"]:
            raise fail(
                str(self.folder), "must be packed with the teacher's tokenizer", "another one", "Delete the folder."
            )
        if start_tokens(tokenizer) != self._start:
            got = "windows without it, of an earlier version"
            raise fail(str(self.folder), "windows begin with the tokenizer's start token", got, "Delete the folder.")
        if _key(config) != self._index["config"]:
            raise fail(
                str(self.folder), "must be packed from the recipe's data", "other settings", "Delete the folder."
            )
        if self.train_tokens < config.window + 1:
            rule = f"must be less than the {self.train_tokens} training tokens"
            raise fail("data.window", rule, config.window, "Add text.")

    def batch(self, seed: int, step: int, rank: int, world: int, batch: int, window: int) -> TokenBatch:
        """Rows `rank * batch ...` of the step's `world * batch` windows, [B, L].

        Every epoch cuts the tokens at another offset and visits the windows in another order, both drawn from
        (seed, epoch) alone.
        """
        rows = [self._row(seed, step * world * batch + rank * batch + i, window) for i in range(batch)]
        tokens, loss = self._train, self._loss
        return TokenBatch(
            self._windows(tokens, rows, window, self._start),
            torch.from_numpy(np.stack([loss[r : r + window] for r in rows]).astype(bool)),
            step,
        )

    @staticmethod
    def _windows(tokens: np.ndarray, rows: list[int], window: int, start: list[int]) -> Tensor:
        """Windows [W, L] int64 from `rows` on, the first tokens of each replaced by `start`."""
        windows_WL = torch.from_numpy(np.stack([tokens[r : r + window] for r in rows]).astype(np.int64))
        windows_WL[:, : len(start)] = torch.tensor(start, dtype=torch.int64)
        return windows_WL

    def _row(self, seed: int, number: int, window: int) -> int:
        """Where the window of the `number`-th row begins."""
        per_epoch = max(1, self.train_tokens // window - 1)
        epoch, place = divmod(number, per_epoch)
        key = (seed, epoch, window)
        if getattr(self, "_order_key", None) != key:
            draw = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
            spare = self.train_tokens - per_epoch * window
            self._order_key, self._offset, self._order = key, int(draw.integers(spare + 1)), draw.permutation(per_epoch)
        return self._offset + int(self._order[place]) * window

    def heldout_names(self) -> list[str]:
        """Names of the held-out sets that hold tokens, the domain included."""
        return list(self._heldout)

    def heldout_windows(self, name: str, window: int, max_tokens: int, raw: bool = False) -> Tensor:
        """Windows of a held-out set, [W, L] int64, always the same: the first of every document, then the second ...

        A window lies inside one document; documents shorter than a window are taken together. `raw` ones have no start
        token, since they are to stand in the midst of others.
        """
        tokens, starts = self._heldout[name], self._index["heldout"][name]["starts"]
        by_document = _window_starts([*starts, len(tokens)], window)
        in_turn = [s for turn in zip_longest(*by_document) for s in turn if s is not None]
        chosen = in_turn[: max(1, max_tokens // window)]
        if not chosen:
            return torch.empty(0, window, dtype=torch.int64)
        return self._windows(tokens, chosen, window, [] if raw else self._start)


def _index(folder: Path) -> dict[str, Any]:
    # what is no packed data may be anything of the user's: nobody is told to delete it
    do = "Name another folder, or move this one away."
    try:
        index = json.loads((folder / INDEX).read_text())
    except FileNotFoundError as error:
        raise fail(str(folder), "must be packed data, or new", f"a folder without {INDEX}", do) from error
    except (OSError, ValueError) as error:
        raise fail(str(folder), "must be packed data", error, do) from error
    if not isinstance(index, dict) or not index.keys() >= KEYS:
        raise fail(str(folder), "must be packed data", f"another kind of {INDEX}", do)
    return index


def _window_starts(edges: list[int], window: int) -> list[list[int]]:
    """Where windows begin, for each document that holds some and for each run of short ones that fills one."""
    groups: list[list[int]] = []
    run: int | None = None
    for start, end in pairwise(edges):
        if end - start >= window:
            groups.append(list(range(start, end - window + 1, window)))
            run = None
            continue
        run = start if run is None else run
        if end - run >= window:
            groups.append([run])
            run = None
    return groups
