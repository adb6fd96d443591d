"""Teachers' logits on disk: what a logits stage reads of them, written once and read where `offline` names the folder.

OFFLINE/4-logits/ holds stamp.json (all that its content depends on), a shard of safetensors for every so many steps,
and index.json, written last, with each shard's hash. A position keeps its K likeliest tokens with their
log-probabilities at the stage's temperature, rounded to the dtype the recipe names, and the log-probability of all
others in float32.

S steps of a shard, T = batch (window - 1) positions of a step, K kept tokens.
"""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from ssmorph.convert.teachers import load_config, resolve
from ssmorph.kernels.distill import Side, distill_topk_loss, topk_of

from ..errors import fail
from .config import SELF, LogitsStage, RunConfig
from .context import Context
from .data import TokenBatch
from .loop import total_steps
from .rundir import RunDir, atomic_write, file_hash
from .targets import Distance, Live

FORMAT = 1
# bytes of a shard: what a reader holds, and the most that an interrupted writer does again
SHARD = 16 << 20
STAMP, INDEX = "stamp.json", "index.json"
WRITE = "Run: ssmorph data logits RECIPE"


def folder_of(config: RunConfig, index: int) -> Path:
    """Where a stage's logits lie."""
    stage = config.stages[index]
    assert isinstance(stage, LogitsStage)
    assert stage.offline is not None
    return Path(stage.offline).expanduser() / config.stage_names()[index]


def check_stored(config: RunConfig, indices: list[int]) -> None:
    """Refuses stages whose logits nobody stored, or not to the end; says nothing of what they are.

    Raises:
        ValueError: no index.json in a stage's folder.
    """
    for index in indices:
        stage = config.stages[index]
        if isinstance(stage, LogitsStage) and stage.offline is not None:
            folder = folder_of(config, index)
            if not (folder / INDEX).is_file():
                got = "some of them" if folder.is_dir() else f"no {folder}"
                raise fail(f"stages[{index}].offline", "the stage's logits must be stored", got, f"{WRITE}.")


def check_stamps(ctx: Context, indices: list[int]) -> None:
    """Refuses, before the first stage runs, what `Stored` would refuse when its stage begins.

    Raises:
        ValueError: logits of another teacher, text, seed or setting, each named.
    """
    for index in indices:
        stage = ctx.config.stages[index]
        if isinstance(stage, LogitsStage) and stage.offline is not None:
            Stored(ctx, index, stage)


def stamp_of(ctx: Context, index: int, stage: LogitsStage) -> dict[str, Any]:
    """All that stored logits depend on, as plain values."""
    own, window = ctx.config.teacher, ctx.config.data.window
    teachers, vocabularies = [], [ctx.teacher.config.vocab_size]
    for t in stage.teachers:
        place = own if t.source == SELF else t
        config = load_config(place.source, place.revision, place.trust_remote_code)
        vocabularies.append(config.vocab_size)
        named = {"source": place.source, "revision": place.revision, "weight": t.weight}
        teachers.append({**named, "weights": _weights_hash(place.source, config)})
    row = 4 + stage.offline_top_k * (4 + getattr(torch, stage.offline_dtype).itemsize)
    return {
        "format": FORMAT, "teachers": teachers, "temperature": stage.temperature, "top_k": stage.offline_top_k,
        "dtype": stage.offline_dtype, "data": ctx.data.train_hash(), "seed": ctx.config.seed, "stage": index,
        "batch": stage.batch, "window": window, "steps": total_steps(stage, window), "vocabulary": min(vocabularies),
        "steps_per_shard": max(1, SHARD // (stage.batch * (window - 1) * row)),
    }  # fmt: skip


def _weights_hash(source: str, config: Any) -> str:
    """What tells a teacher from its namesakes: a hash of a folder's config and weights, the commit of a hub id."""
    folder = Path(resolve(source))
    if not folder.is_dir():
        return f"commit {getattr(config, '_commit_hash', None)}"
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256("".join(f"{file.name} {file_hash(file)}\n" for file in files).encode()).hexdigest()


def _agree(folder: Path, stamp: dict[str, Any], do: str) -> None:
    """Refuses a folder that was written for something else, by name."""
    saved = _read_json(folder / STAMP)
    other = [f"{key}: {saved.get(key)} -> {value}" for key, value in stamp.items() if saved.get(key) != value]
    if other:
        raise fail(str(folder), "must hold the logits that this recipe reads", "; ".join(other), do)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise fail(str(file), "must be readable JSON", error, f"Delete {file.parent}. {WRITE}.") from error
    return found


def shard_steps(stamp: dict[str, Any]) -> list[range]:
    """The steps of each shard."""
    per, steps = stamp["steps_per_shard"], stamp["steps"]
    return [range(first, min(first + per, steps)) for first in range(0, steps, per)]


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.safetensors"


def write_stage(ctx: Context, index: int, stage: LogitsStage) -> dict[str, Any]:
    """Writes what is missing of a stage's logits; returns folder, steps, tokens, bytes and how much K tokens keep.

    Raises:
        ValueError: a folder written for another recipe, more tokens than the vocabulary holds, a full disk.
        Interrupted: a signal came; whole shards stay, and the same command goes on after them.
    """
    folder, stamp = folder_of(ctx.config, index), stamp_of(ctx, index, stage)
    name, shards = ctx.config.stage_names()[index], shard_steps(stamp)
    files = [_shard(folder, number) for number in range(len(shards))]
    # for its lock, and because it sweeps what a killed process left
    with RunDir(folder):
        if (folder / STAMP).exists():
            _agree(folder, stamp, "Delete it, or name another folder.")
        else:
            atomic_write(folder / STAMP, json.dumps(stamp, indent=1) + "\n")
        _write_shards(ctx, index, stage, [pair for pair in zip(files, shards, strict=True) if not pair[0].exists()])
        if not (folder / INDEX).exists():
            atomic_write(folder / INDEX, json.dumps({file.name: file_hash(file) for file in files}, indent=1) + "\n")
    tokens, size = stamp["steps"] * stage.batch * stamp["window"], sum(file.stat().st_size for file in files)
    kept = 1 - sum(_rest(file) for file in files) / (stamp["steps"] * stage.batch * (stamp["window"] - 1))
    return {"stage": name, "folder": str(folder), "steps": stamp["steps"], "tokens": tokens, "bytes": size,
            "probability_kept": round(kept, 4)}  # fmt: skip


def _rest(file: Path) -> float:
    """The probabilities of all but kept tokens, summed over a shard's positions."""
    with safe_open(file, "pt") as opened:
        return float(opened.get_tensor("log_rest").double().exp().sum())


def _write_shards(ctx: Context, index: int, stage: LogitsStage, missing: list[tuple[Path, range]]) -> None:
    if not missing:
        return
    (missing[0][0].parent / INDEX).unlink(missing_ok=True)
    live = Live(ctx, stage)
    for file, steps in missing:
        atomic_write(file, save(_kept(ctx, index, stage, live, steps)))
        ctx.say(f"{ctx.config.stage_names()[index]}: stored the logits of steps {steps.start} to {steps.stop - 1}")


def _kept(ctx: Context, index: int, stage: LogitsStage, live: Live, steps: range) -> dict[str, Tensor]:
    """A shard: indices [S, T, K] int32, log_probs [S, T, K], log_rest [S, T] float32."""
    found = []
    for step in steps:
        ctx.stop.check()
        ends = live.ends(ctx.batch(index, step, stage.batch).tokens_BL)
        found.append(topk_of(ends, live.weights, stage.offline_top_k, temperature=stage.temperature))
    indices, log_probs, log_rest = (torch.stack(parts).cpu() for parts in zip(*found, strict=True))
    dtype = getattr(torch, stage.offline_dtype)
    return {"indices": indices.int(), "log_probs": log_probs.to(dtype), "log_rest": log_rest.float()}


class Stored:
    """The target of a stage whose logits were stored: no teacher runs, one shard at a time is in memory."""

    runs_own = False

    def __init__(self, ctx: Context, index: int, stage: LogitsStage) -> None:
        """Opens the folder.

        Raises:
            ValueError: logits of another teacher, text, seed or setting, each named.
        """
        self.stage, self.folder = stage, folder_of(ctx.config, index)
        stamp = stamp_of(ctx, index, stage)
        _agree(self.folder, stamp, f"Name another folder, or delete it. {WRITE}.")
        self.vocabulary, self.per_shard = stamp["vocabulary"], stamp["steps_per_shard"]
        self.hashes = _read_json(self.folder / INDEX)
        self.number, self.tensors = -1, dict[str, Tensor]()

    def read(self, batch: TokenBatch) -> Distance:
        """See `Target`."""
        number, place = divmod(batch.step, self.per_shard)
        if number != self.number:
            self.number, self.tensors = number, self._load(_shard(self.folder, number))
        kept = {name: tensor[place].to(batch.tokens_BL.device) for name, tensor in self.tensors.items()}
        return partial(self._loss, kept)

    def _load(self, file: Path) -> dict[str, Tensor]:
        try:
            content = file.read_bytes()
            if hashlib.sha256(content).hexdigest() == self.hashes.get(file.name):
                return load(content)
        except (OSError, SafetensorError) as error:
            raise fail(str(file), "must be readable", error, f"Delete it. {WRITE}.") from error
        raise fail(str(file), "must be what was stored", "other content", f"Delete it. {WRITE}.")

    def _loss(self, kept: dict[str, Tensor], student: Side, labels_T: Tensor, mask_T: Tensor) -> Tensor:
        stage = self.stage
        return distill_topk_loss(
            student.hidden_TD, student.head_VD, kept["indices"], kept["log_probs"].float(), log_rest_T=kept["log_rest"],
            temperature=stage.temperature, labels_T=labels_T if stage.ce_weight else None, ce_weight=stage.ce_weight,
            mask_T=mask_T, student_bias_V=student.bias_V, student_scale=student.scale, student_softcap=student.softcap,
        )  # fmt: skip
