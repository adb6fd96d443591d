"""Stored logits: what a stage makes of them beside a live teacher, what is refused, and kills on both sides."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssmorph import verbs
from ssmorph.errors import UserError
from ssmorph.stages import logits, loop, offline, pipeline, targets
from ssmorph.stages.context import Interrupted
from ssmorph.stages.data import TokenBatch

from .test_teachers import both, save_copy, save_teacher
from .tiny_run import QUICK, RECIPE, in_child, outcome, run_tiny

SECONDS: dict[str, Any] = {"say": lambda _line: None}


def store(folder: Path, *overrides: str, run: str = "run") -> list[dict[str, Any]]:
    """What `data logits` says of the tiny recipe; its folder is FOLDER/logits."""
    torch.set_num_threads(1)
    return verbs.store_logits(RECIPE, *QUICK, *options(folder, *overrides), run_dir=str(folder / run), **SECONDS)


def options(folder: Path, *overrides: str) -> tuple[str, ...]:
    return (f"stages.logits.offline={folder / 'logits'}", *overrides)


def convert(folder: Path, *overrides: str, run: str = "run", **more: Any) -> Path:
    return run_tiny(folder / run, *options(folder, *overrides), **more)


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["stage"] == "4-logits"]


def trained(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "4-logits" / "student" / "student.safetensors")


EXACT = ("stages.logits.offline_top_k=260", "stages.logits.offline_dtype=float32")


@pytest.mark.parametrize("setting", ["plain", "two teachers, another temperature, cross-entropy"])
def test_the_whole_vocabulary_in_float32_is_the_live_teacher(tmp_path: Path, setting: str) -> None:
    """Losses of every step, and the weights that the gradients lead to."""
    change: tuple[str, ...] = ()
    if setting != "plain":
        larger = save_teacher(tmp_path / "larger", vocab_size=264)
        change = (both(larger), "stages.logits.temperature=2.0", "stages.logits.ce_weight=0.4")
    store(tmp_path, *EXACT, *change)
    stored, live = convert(tmp_path, *EXACT, *change), run_tiny(tmp_path / "live", *change)
    assert losses(stored) == pytest.approx(losses(live), rel=2e-6)
    start = load_file(live / "3-hidden" / "student" / "student.safetensors")
    ours, theirs = trained(stored), trained(live)
    moved = max((theirs[name] - start[name]).abs().max() for name in start)
    assert max((ours[name] - theirs[name]).abs().max() for name in theirs) < 1e-3 * moved


class Steps:
    """A stage's loss and gradient of final states, from stored logits and from a live teacher, at any step."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *change: str) -> None:
        seen: list[Any] = []
        original = logits.run_logits
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "run_logits", lambda *args: (seen.append(args), original(*args))[1])
            convert(folder, *change)
        self.ctx, self.index, self.stage = seen[0]

    def of(self, target: Any, step: int) -> tuple[float, torch.Tensor]:
        batch: TokenBatch = self.ctx.batch(self.index, step, self.stage.batch)
        ends = self.ctx.spec.logits(self.ctx.teacher.config)
        with torch.no_grad():
            states = targets.final_states(self.ctx.student, batch.tokens_BL)
        states.requires_grad_(True)
        student = targets.end_of(self.ctx.student, ends, states, target.vocabulary)
        loss = target.read(batch)(student, batch.tokens_BL[:, 1:].flatten(), batch.loss_mask_BL[:, 1:].flatten())
        loss.backward()
        assert states.grad is not None
        return loss.item(), states.grad


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 2e-3), ("bfloat16", 2e-2), ("float32", 1e-5)])
def test_gradients_are_exact_to_the_stored_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, bound: float
) -> None:
    change = ("stages.logits.offline_top_k=260", f"stages.logits.offline_dtype={dtype}")
    store(tmp_path, *change)
    steps = Steps(tmp_path, monkeypatch, *change)
    stored = offline.Stored(steps.ctx, steps.index, steps.stage)
    for step in (4, 0):
        (loss, grad), (wanted, exact) = (steps.of(t, step) for t in (stored, targets.Live(steps.ctx, steps.stage)))
        assert loss == pytest.approx(wanted, rel=bound)
        assert (grad - exact).norm() <= bound * exact.norm()


def test_with_few_tokens_the_loss_is_what_is_known_of_the_teachers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most the whole KL; the error of the gradient is bounded by the teacher's rest."""
    change = ("stages.logits.offline_top_k=16", "stages.logits.offline_dtype=float32")
    store(tmp_path, *change)
    steps = Steps(tmp_path, monkeypatch, *change)
    stored, live = offline.Stored(steps.ctx, steps.index, steps.stage), targets.Live(steps.ctx, steps.stage)
    (loss, grad), (whole, exact) = steps.of(stored, 2), steps.of(live, 2)
    assert 0.5 * whole < loss < whole
    # kept tokens' gradients are exact; the others' lie off by twice the teacher's rest together
    rest_T = load_file(stored.folder / "000000.safetensors")["log_rest"][2].exp()
    longest = steps.ctx.student.get_output_embeddings().weight.norm(dim=1).max()
    bound_T = 2 * rest_T * longest / len(rest_T) + 1e-6
    assert ((grad - exact).norm(dim=-1) <= bound_T).all()
    assert (grad - exact).norm() > 1e-3 * exact.norm()


def test_no_teacher_runs_where_logits_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    larger = save_teacher(tmp_path / "larger")
    change = f"stages.logits.teachers=[{{source: {larger}}}]"
    (written,) = store(tmp_path, change)
    assert (written["stage"], written["steps"], written["tokens"]) == ("4-logits", 5, 480)
    assert written["bytes"] == sum(file.stat().st_size for file in Path(written["folder"]).glob("*.safetensors"))

    rest_ST = load_file(Path(written["folder"]) / "000000.safetensors")["log_rest"].exp()
    assert written["probability_kept"] == pytest.approx(1 - rest_ST.mean().item(), abs=1e-4)
    assert 0.5 < written["probability_kept"] < 1

    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("a teacher of the stage was loaded")

    monkeypatch.setattr(targets, "load_teacher", read)
    assert losses(convert(tmp_path, change))[0] > 0


def test_a_layer_term_has_its_teacher_all_the_same(tmp_path: Path) -> None:
    change = ("stages.logits.layer_weight=0.5",)
    store(tmp_path, *EXACT, *change)
    stored, live = convert(tmp_path, *EXACT, *change), run_tiny(tmp_path / "live", *change)
    assert losses(stored) == pytest.approx(losses(live), rel=2e-6)


def killed_at(patch: pytest.MonkeyPatch, module: Any, name: str, count: int) -> None:
    original, calls = getattr(module, name), [0]

    def fatal(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    patch.setattr(module, name, fatal)


def test_kills_while_storing_and_while_training_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "SHARD", 2 * 94 * (4 + 64 * 6))
    store(tmp_path, run="whole")
    whole, saved = convert(tmp_path, run="whole"), contents(tmp_path / "logits")
    assert sorted(name for name in saved if name.endswith("tensors")) == [f"{i:06d}.safetensors" for i in range(3)]
    shutil.rmtree(tmp_path / "logits")
    for module, name, count in ((offline, "topk_of", 4), (os, "fsync", 3), (offline, "file_hash", 3)):
        with monkeypatch.context() as patch:
            killed_at(patch, module, name, count)
            assert in_child(lambda: store(tmp_path)) == -signal.SIGKILL
    store(tmp_path)
    assert contents(tmp_path / "logits") == saved
    with monkeypatch.context() as patch:
        killed_at(patch, loop, "set_rate", 14)
        assert in_child(lambda: convert(tmp_path)) == -signal.SIGKILL
    said: list[str] = []
    run = convert(tmp_path, say=said.append)
    assert "4-logits: resumed at step 2 of 5" in said
    assert outcome(run) == outcome(whole)


def contents(folder: Path) -> dict[str, bytes]:
    files = [file for file in (folder / "4-logits").iterdir() if file.name != ".lock"]
    return {file.name: file.read_bytes() for file in files}


def test_a_signal_keeps_whole_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "SHARD", 1)
    original, calls = offline.topk_of, [0]

    def stopping(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(offline, "topk_of", stopping)
        with pytest.raises(Interrupted):
            store(tmp_path)
    assert len(list((tmp_path / "logits" / "4-logits").glob("*.safetensors"))) == 2
    with pytest.raises(UserError, match=r"stages\[4\]\.offline: the stage's logits must be stored; got some of them"):
        convert(tmp_path)
    store(tmp_path)
    again = [0]
    monkeypatch.setattr(offline, "topk_of", lambda *_a, **_k: again.append(1))
    store(tmp_path)
    assert again == [0]


CHANGES: dict[str, Callable[[Path], tuple[str, ...]]] = {
    r"seed: 0 -> 1": lambda _: ("seed=1",),
    r"window: 48 -> 40; steps: 5 -> 6": lambda _: ("data.window=40",),
    r"temperature: 1.0 -> 2.0": lambda _: ("stages.logits.temperature=2.0",),
    r"top_k: 64 -> 32": lambda _: ("stages.logits.offline_top_k=32",),
    r"data: \w{64} -> \w{64}": lambda _: ("data.max_tokens=10000",),
    r"teachers: .*'weights': '(\w{64})'.* -> .*'weights': '(?!\1)\w{64}'": lambda folder: (other_weights(folder),),
}  # fmt: skip


def other_weights(folder: Path) -> str:
    """The same folder's name, with weights changed under it."""
    tensors = load_file(folder / "model" / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    return "seed=0"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    save_copy(folder / "model")
    store(folder, f"teacher.source={folder / 'model'}")
    return folder


@pytest.mark.parametrize("message", list(CHANGES))
def test_logits_of_something_else_are_refused_by_name(stored: Path, tmp_path: Path, message: str) -> None:
    folder = Path(shutil.copytree(stored, tmp_path / "copy"))
    shutil.rmtree(stored / "model", ignore_errors=True)
    shutil.copytree(folder / "model", stored / "model")
    change = (f"teacher.source={stored / 'model'}", *CHANGES[message](stored))
    match = rf"4-logits: must hold the logits that this recipe reads; got .*{message}"
    try:
        with pytest.raises(UserError, match=match):
            convert(folder, *change, run="other")
        # before any stage ran
        assert not (folder / "other" / "0-surgery").exists()
        with pytest.raises(UserError, match=match):
            store(folder, *change, run="third")
    finally:
        shutil.rmtree(stored / "model")
        shutil.copytree(folder / "model", stored / "model")


def test_mistakes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"offline: the stage's logits must be stored; got no .*Run: ssmorph data logits"
    ):
        convert(tmp_path)
    with pytest.raises(UserError, match="one with offline is needed"):
        verbs.store_logits(RECIPE, run_dir=str(tmp_path / "run"), **SECONDS)
    with pytest.raises(UserError, match=r"stages\[4\]\.loss: stored logits know kl alone; got jsd"):
        store(tmp_path, "stages.logits.loss=jsd")
    with pytest.raises(UserError, match=r"1\.\.260, the vocabulary; got 300"):
        store(tmp_path, "stages.logits.offline_top_k=300")
    shutil.rmtree(tmp_path / "logits")
    store(tmp_path)
    shard = tmp_path / "logits" / "4-logits" / "000000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"000000.safetensors: must be what was stored; got other content"):
        convert(tmp_path)
    shard.unlink()
    store(tmp_path)
    assert losses(convert(tmp_path))[-1] > 0
