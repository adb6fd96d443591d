"""Checkpoints come back bit for bit, or say which file is damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ssmorph.errors import UserError
from ssmorph.stages import checkpoint
from ssmorph.stages.checkpoint import (
    checkpoints,
    content_hash,
    latest_checkpoint,
    load_checkpoint,
    prune,
    save_checkpoint,
)


def trained(dtype: torch.dtype = torch.float32, steps: int = 3) -> tuple[list[nn.Parameter], torch.optim.AdamW]:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in [(3, 2), (4,), ()]]
    optim = torch.optim.AdamW([{"params": parameters[:1], "peak": 0.1 + 0.2}, {"params": parameters[1:], "lr": 1e-5}])
    for _ in range(steps):
        step(parameters, optim)
    return parameters, optim


def step(parameters: list[nn.Parameter], optim: torch.optim.AdamW) -> None:
    optim.zero_grad()
    torch.stack([p.square().sum() for p in parameters]).sum().backward()
    optim.step()


def same(a: Any, b: Any) -> bool:
    """Equal in type, dtype, shape and every bit."""
    if isinstance(a, Tensor):
        return (
            a.dtype == b.dtype and a.shape == b.shape and a.detach().numpy(force=True).tobytes() == b.numpy().tobytes()
        )
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def save(stage: Path, number: int, **tensors: Tensor) -> Path:
    folder = stage / f"checkpoint-{number:06d}"
    save_checkpoint(
        folder, tensors=tensors or {"w": torch.ones(4)}, optim=trained()[1].state_dict(), meta={"step": number}
    )
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_optimizer_and_meta_come_back_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    parameters, optim = trained(dtype)
    tensors = {str(i): p.detach() for i, p in enumerate(parameters)}
    meta = {"step": 3, "loss": 0.1 + 0.2, "scales": [1e-300, None, True], "seed": 2**63 - 1, "name": "ä"}
    save_checkpoint(tmp_path / "c", tensors=tensors, optim=optim.state_dict(), meta=meta)
    loaded, state, read = load_checkpoint(tmp_path / "c")
    assert same({k: loaded[k] for k in tensors}, tensors)
    assert set(loaded) == set(tensors)
    assert state["param_groups"] == optim.state_dict()["param_groups"]
    assert same(sorted(map(str, state["state"])), sorted(map(str, optim.state_dict()["state"])))
    assert all(
        same(dict(sorted(v.items())), dict(sorted(state["state"][i].items())))
        for i, v in optim.state_dict()["state"].items()
    )
    assert read == meta


def test_training_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    parameters, optim = trained()
    tensors = {str(i): p for i, p in enumerate(parameters)}
    save_checkpoint(tmp_path / "c", tensors=dict(tensors), optim=optim.state_dict(), meta={})
    loaded, state, _ = load_checkpoint(tmp_path / "c")
    again, optim_again = trained(steps=0)
    with torch.no_grad():
        for i, p in enumerate(again):
            p.copy_(loaded[str(i)])
    optim_again.load_state_dict(state)
    for _ in range(2):
        step(parameters, optim)
        step(again, optim_again)
    assert all(torch.equal(a, b) for a, b in zip(parameters, again, strict=True))


def test_tensors_of_every_kind_keep_their_bits(tmp_path: Path) -> None:
    noise_N = torch.randint(-(2**15), 2**15, (64,), generator=torch.Generator().manual_seed(1)).to(torch.int16)
    tensors = {
        "bf16": noise_N.view(torch.bfloat16),  # every pattern, NaNs with payloads among them
        "steps": torch.tensor(2**53 + 1),
        "flags": torch.tensor([True, False]),
        "empty": torch.empty(0, 3),
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "rng/cpu": torch.get_rng_state(),
    }
    loaded, _, _ = load_checkpoint(save(tmp_path, 1, **tensors))
    assert torch.equal(loaded["bf16"].view(torch.int16), noise_N)
    for name in tensors.keys() - {"bf16"}:
        assert loaded[name].dtype == tensors[name].dtype
        assert torch.equal(loaded[name], tensors[name]), name


def test_the_saved_rng_state_draws_the_same_numbers(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        folder = save(tmp_path, 1, **{"rng/cpu": torch.get_rng_state()})
        expected = torch.rand(3)
        torch.set_rng_state(load_checkpoint(folder)[0]["rng/cpu"])
        assert torch.equal(torch.rand(3), expected)


def test_nothing_is_pickled(tmp_path: Path) -> None:
    suffixes = {file.suffix for file in save(tmp_path, 1).iterdir()}
    assert suffixes == {".safetensors", ".json"}


@pytest.mark.parametrize("name", ["parameters.safetensors", "optimizer.safetensors", "meta.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    file = save(tmp_path, 1) / name
    content = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    else:
        content[-5] ^= 1
        file.write_bytes(content[:-3] if damage == "cut" else content)
    with pytest.raises(UserError) as caught:
        load_checkpoint(file.parent)
    # a flipped bit in the manifest changes a hash there, and the file of that hash is blamed
    assert ("checkpoint-000001" if (name, damage) == ("manifest.json", "flipped") else name) in str(caught.value)


def test_latest_is_the_highest_step_that_is_whole(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    for number in (999_999, 1_000_000, 500):
        save(tmp_path, number)
    for name in ("checkpoint-2000000", "checkpoint-notes", ".partial-checkpoint-3000000-9"):
        (tmp_path / name).mkdir()
    assert [folder.name for folder in checkpoints(tmp_path)] == [
        "checkpoint-000500",
        "checkpoint-999999",
        "checkpoint-1000000",
    ]
    (tmp_path / "checkpoint-1000000" / "parameters.safetensors").unlink()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-999999"


def test_prune_keeps_the_newest_whole_ones(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        save(tmp_path, number)
    (tmp_path / "checkpoint-000004").mkdir()
    prune(tmp_path, 2)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-000002", "checkpoint-000003"]
    prune(tmp_path, 5)
    assert len(checkpoints(tmp_path)) == 2


def test_a_kill_while_pruning_leaves_whole_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2, 3):
        save(tmp_path, number)
    calls, replace = [], os.replace

    def dying(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path, 1)
    left = checkpoints(tmp_path)
    assert [folder.name for folder in left] == ["checkpoint-000002", "checkpoint-000003"]
    assert [load_checkpoint(folder)[2]["step"] for folder in left] == [2, 3]


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"checkpoint-000002: .*nothing saved was lost"):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000001"]
    assert load_checkpoint(tmp_path / "checkpoint-000001")[2] == {"step": 1}


def test_equal_checkpoints_have_equal_hashes(tmp_path: Path) -> None:
    first, second = save(tmp_path / "a", 1), save(tmp_path / "b", 1)
    assert content_hash(first) == content_hash(second) != content_hash(save(tmp_path / "a", 2))
    assert set(json.loads((first / "manifest.json").read_text())) == {
        "meta.json",
        "optimizer.safetensors",
        "parameters.safetensors",
    }
