"""Packed data: token shards on disk, mapped into memory, and batches that are a pure function of (seed, step, rank).

Documents are joined with an end-of-text token between them. The data cursor is one integer, the step, so resuming is
exact at any world size.

B batch, L window length, W windows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import fail
from .chat import Encoded, encode
from .config import DataConfig
from .corpus import Corpus, Document, load_corpus
from .rundir import atomic_folder

INDEX = "index.json"


class TokenBatch(NamedTuple):
    """Tokens [B, L] int64, and which of them carry loss [B, L] bool."""

    tokens_BL: Tensor
    loss_mask_BL: Tensor


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash of the vocabulary, which packed tokens depend on."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(vocabulary.encode()).hexdigest()


def open_or_pack(config: DataConfig, tokenizer: Any, folder: Path, say: Callable[[str], None]) -> PackedData:
    """The packed data of a folder, made on first use.

    Raises:
        ValueError: a corpus that is empty or shorter than a window, another tokenizer, a damaged shard.
    """
    if not folder.is_dir():
        corpus = load_corpus(config)
        with atomic_folder(folder) as partial:
            _pack(corpus, tokenizer, config, partial)
        packed = PackedData(folder)
        say(f"data: {packed.train_tokens} training tokens from {len(packed.provenance)} sources")
    packed = PackedData(folder)
    packed.check(tokenizer, config)
    return packed


def _pack(corpus: Corpus, tokenizer: Any, config: DataConfig, folder: Path) -> None:
    vocabulary = len(tokenizer)
    dtype = np.uint16 if vocabulary <= 1 << 16 else np.uint32
    sets = {"train": corpus.train, **corpus.heldout}
    if corpus.domain is not None:
        sets[corpus.domain[0]] = corpus.domain[1]
    index: dict[str, Any] = {
        "dtype": np.dtype(dtype).name,
        "tokenizer": tokenizer_hash(tokenizer),
        "config": _key(config),
        "domain": corpus.domain[0] if corpus.domain else None,
        "provenance": corpus.provenance,
        "sets": {},
    }
    for number, (name, documents) in enumerate(sets.items()):
        limit = config.max_tokens if name == "train" else None
        tokens, losses, starts = _encode_all(documents, tokenizer, config, limit)
        np.asarray(tokens, dtype=dtype).tofile(folder / f"{number}.tokens")
        np.asarray(losses, dtype=np.uint8).tofile(folder / f"{number}.loss")
        index["sets"][name] = {"file": number, "tokens": len(tokens), "starts": starts}
    if index["sets"]["train"]["tokens"] < config.window + 1:
        got = f"{index['sets']['train']['tokens']} tokens"
        raise fail(
            "data.sources", f"must hold at least one window of {config.window} tokens to train on", got, "Add text."
        )
    (folder / INDEX).write_text(json.dumps(index))


def _encode_all(
    documents: Iterable[Document], tokenizer: Any, config: DataConfig, limit: int | None
) -> tuple[list[int], list[bool], list[int]]:
    tokens: list[int] = []
    losses: list[bool] = []
    starts: list[int] = []
    end = tokenizer.eos_token_id
    if end is None:
        raise fail("teacher.tokenizer", "must have an end-of-text token", "none", "Use the model's own tokenizer.")
    for document in documents:
        encoded: Encoded = encode(document, tokenizer, config.loss_on)
        starts.append(len(tokens))
        tokens += [*encoded.tokens, end]
        losses += [*encoded.loss, True]
        if limit is not None and len(tokens) >= limit:
            return tokens[:limit], losses[:limit], starts
    return tokens, losses, starts


def _key(config: DataConfig) -> dict[str, Any]:
    """What the shards depend on; the window is not part of it."""
    return json.loads(json.dumps({k: v for k, v in asdict(config).items() if k != "window"}))


class PackedData:
    """A folder of packed sets: `train`, one held-out set per source, and the held-out domain."""

    def __init__(self, folder: Path) -> None:
        """Opens the folder.

        Raises:
            ValueError: a shard whose size is not what the index says.
        """
        self.folder = folder
        try:
            self._index = json.loads((folder / INDEX).read_text())
        except (OSError, ValueError) as error:
            raise fail(str(folder), "must be packed data", error, "Delete the folder to pack it again.") from error
        dtype = np.dtype(self._index["dtype"])
        self._tokens, self._loss = {}, {}
        for name, entry in self._index["sets"].items():
            file = folder / f"{entry['file']}.tokens"
            expected = entry["tokens"] * dtype.itemsize
            if not file.is_file() or file.stat().st_size != expected:
                got = f"{file.stat().st_size} bytes" if file.is_file() else "no file"
                raise fail(str(file), f"must be {expected} bytes", got, "Delete the folder to pack it again.")
            if entry["tokens"]:
                self._tokens[name] = np.memmap(file, dtype=dtype, mode="r")
                self._loss[name] = np.memmap(folder / f"{entry['file']}.loss", dtype=np.uint8, mode="r")
        self.domain_name: str | None = self._index["domain"]
        self.provenance: list[dict[str, Any]] = self._index["provenance"]

    @property
    def train_tokens(self) -> int:
        """Tokens in the training set."""
        return int(self._index["sets"]["train"]["tokens"])

    def check(self, tokenizer: Any, config: DataConfig) -> None:
        """Raises ValueError if the shards were made by another tokenizer or from other sources."""
        if tokenizer_hash(tokenizer) != self._index["tokenizer"]:
            raise fail(
                str(self.folder), "must be packed with the teacher's tokenizer", "another one", "Delete the folder."
            )
        if _key(config) != self._index["config"]:
            raise fail(
                str(self.folder), "must be packed from the recipe's data", "other settings", "Delete the folder."
            )
        if self.train_tokens < config.window + 1:
            raise fail("data.window", f"must fit the {self.train_tokens} training tokens", config.window, "Add text.")

    def batch(self, seed: int, step: int, rank: int, world: int, batch: int, window: int) -> TokenBatch:
        """Rows `rank * batch ...` of the step's `world * batch` windows, [B, L].

        Every epoch cuts the tokens at another offset and visits the windows in another order, both drawn from
        (seed, epoch) alone.
        """
        rows = [self._row(seed, step * world * batch + rank * batch + i, window) for i in range(batch)]
        tokens, loss = self._tokens["train"], self._loss["train"]
        return TokenBatch(
            torch.from_numpy(np.stack([tokens[r : r + window] for r in rows]).astype(np.int64)),
            torch.from_numpy(np.stack([loss[r : r + window] for r in rows]).astype(bool)),
        )

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
        return [name for name in self._tokens if name != "train"]

    def heldout_windows(self, name: str, window: int, max_tokens: int) -> Tensor:
        """Windows of a held-out set, [W, L] int64: always the same, each starting where a document does if it can."""
        tokens, starts = self._tokens[name], self._index["sets"][name]["starts"]
        rows: list[Any] = []
        free = 0
        for start in [*starts, len(tokens)]:
            # what is left of the documents before, once it fills a window
            while free + window <= start and len(rows) * window < max_tokens:
                rows.append(tokens[free : free + window])
                free += window
            if start - free < window // 4:
                free = start
        if not rows:
            return torch.empty(0, window, dtype=torch.int64)
        return torch.from_numpy(np.stack(rows[: max(1, max_tokens // window)]).astype(np.int64))
