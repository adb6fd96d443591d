"""The pipeline: what a run refuses, what its stages train and leave alone, every variation of them, and final/."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ssmorph.convert.teachers import load_teacher
from ssmorph.convert.tiny import byte_tokenizer
from ssmorph.errors import UserError
from ssmorph.kernels.distill import distill_loss
from ssmorph.stages import hidden, logits, pipeline, targets
from ssmorph.stages.checkpoint import latest_checkpoint, load_checkpoint
from ssmorph.stages.data import PackedData
from ssmorph.stages.recipe import build, dump, load_recipe
from ssmorph.stages.rundir import RunDir

from .tiny_run import QUICK, RECIPE, STAGES, in_child, outcome, run_tiny


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; rest_lr is positive in its last stage. Tests only read it."""
    return run_tiny(tmp_path_factory.mktemp("whole") / "run")


def teacher_tensors() -> dict[str, torch.Tensor]:
    model, _ = load_teacher("tiny-random-llama")
    return dict(model.state_dict())


def with_stages(folder: Path, stages: list[dict[str, Any]], *overrides: str) -> Path:
    """Runs the tiny recipe with other stages, of two steps each."""
    tree = yaml.safe_load(RECIPE.read_text())
    small = {"tokens": 192, "batch": 2, "checkpoint_every": 5, "optim": {"lr": 1.0e-3}}
    tree["stages"] = [{"kind": "surgery"}, *({**small, **stage} for stage in stages)]
    recipe = folder.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(tree))
    config = load_recipe(recipe, ["evaluate.suite=none", *overrides], run_dir=str(folder))
    return pipeline.convert(config, say=lambda _line: None)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_changed_recipe_is_refused_with_the_difference(tmp_path: Path) -> None:
    run = run_tiny(tmp_path / "run", until="mixing")
    saved = (run / "config.yaml").read_bytes()
    for change, shown in (("stages.mixing.optim.lr=0.5", r"stages\[2\]\.optim\.lr: 0\.001 -> 0\.5"),
                          ("seed=3", "seed: 0 -> 3"), ("data.window=40", "data.window: 48 -> 40")):  # fmt: skip
        with pytest.raises(UserError, match=shown):
            run_tiny(run, change)
    assert (run / "config.yaml").read_bytes() == saved


def test_a_stage_that_has_not_started_may_change(tmp_path: Path) -> None:
    run = run_tiny(tmp_path / "run", until="calibrate")
    run_tiny(run, "stages.mixing.optim.lr=5e-4", until="mixing")
    assert load_recipe(run / "config.yaml").stages[2].optim.lr == 5e-4
    rates = [json.loads(line)["lr"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert 0 < max(rates) <= 5e-4


def test_from_runs_a_stage_and_all_after_it_again(tmp_path: Path, whole: Path) -> None:
    run = run_tiny(tmp_path / "run")
    said: list[str] = []
    stale = [run / name for name in ("report-full.json", "lm-eval-mohawk.json", "report.html")]
    for file in stale:
        file.write_text("{}")
    run_tiny(run, start="hidden", say=said.append)
    assert not any(file.exists() for file in stale), "they are of another student"
    assert [line for line in said if line.endswith("starting")] == ["3-hidden: starting", "4-logits: starting"]
    assert outcome(run) == outcome(whole)


def test_from_accepts_changes_of_the_stages_it_runs_again_only(tmp_path: Path) -> None:
    run = run_tiny(tmp_path / "run")
    before = (run / "2-mixing" / "DONE").read_bytes()
    with pytest.raises(UserError, match=r"stages\[2\]\.batch: 2 -> 1"):
        run_tiny(run, "stages.2.batch=1", start="hidden")
    assert (run / "4-logits" / "DONE").exists()
    run_tiny(run, "stages.hidden.optim.lr=5e-4", start="hidden", until="hidden")
    assert (run / "2-mixing" / "DONE").read_bytes() == before
    assert load_recipe(run / "config.yaml").stages[3].optim.lr == 5e-4
    assert not (run / "4-logits").exists()
    assert not (run / "final").exists()


@pytest.mark.parametrize("option", ["until", "start"])
def test_a_stage_that_the_recipe_lacks_is_refused(tmp_path: Path, option: str) -> None:
    with pytest.raises(UserError, match=r"'logit'.*0-surgery, 1-calibrate"):
        run_tiny(tmp_path / "run", **{option: "logit"})
    assert not (tmp_path / "run").exists()


def test_a_finished_run_does_nothing_again(tmp_path: Path) -> None:
    run = run_tiny(tmp_path / "run")
    before, said = outcome(run), []
    run_tiny(run, say=said.append)
    assert not any("starting" in line for line in said)
    assert outcome(run) == before


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    with RunDir(tmp_path / "run"):
        assert in_child(lambda: _expect(tmp_path / "run", "one process per run")) == 0


def _expect(run: Path, rule: str) -> None:
    with pytest.raises(UserError, match=rule):
        run_tiny(run)


def test_an_artifact_of_another_stage_is_noticed(tmp_path: Path) -> None:
    run = run_tiny(tmp_path / "run", until="mixing")
    marker = json.loads((run / "2-mixing" / "DONE").read_text())
    (run / "2-mixing" / "DONE").write_text(json.dumps({**marker, "source": "0" * 64}))
    with pytest.raises(UserError, match=r"2-mixing: must be made from the stage before it.*--from 2-mixing"):
        run_tiny(run)


@pytest.mark.parametrize("kind", ["mixing", "hidden", "logits"])
def test_a_loss_that_is_not_finite_stops_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    run = tmp_path / "run"
    module = sys.modules[f"ssmorph.stages.{kind}"]
    original, calls = module.train, [0]

    def train(ctx: Any, index: int, stage: Any, step: Any) -> Any:
        def poisoned(batch: Any) -> dict[int, float]:
            found = step(batch)
            calls[0] += 1
            last = max(found)
            return {**found, last: math.nan} if calls[0] == 4 else found

        return original(ctx, index, stage, poisoned)

    monkeypatch.setattr(module, "train", train)
    layer = "" if kind == "logits" else " layer 3"
    with pytest.raises(
        UserError, match=rf"\d-{kind} step 3{layer}: the loss must be finite; got nan\. Lower optim\.lr"
    ):
        run_tiny(run)
    folder = next(run.glob(f"*-{kind}"))
    newest = latest_checkpoint(folder)
    assert newest is not None
    tensors, _, meta = load_checkpoint(newest)
    assert meta["step"] == 2
    assert all(t.isfinite().all() for t in tensors.values())
    monkeypatch.undo()
    run_tiny(run, until=kind)
    assert (folder / "DONE").exists()


def test_an_absurd_rate_is_named_before_anything_is_saved(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"4-logits step \d+.*must be finite.*Lower optim\.lr"):
        run_tiny(tmp_path / "run", "stages.logits.optim.lr=1e30", "stages.logits.checkpoint_every=99")
    assert list((tmp_path / "run" / "4-logits").glob("checkpoint-*")) == []


VARIATIONS: dict[str, tuple[list[dict[str, Any]], tuple[str, ...]]] = {
    "no alignment": ([{"kind": "logits"}], ()),
    "block target": ([{"kind": "hidden", "target": "block"}, {"kind": "hidden", "loss": "mse"}], ()),
    "logits before hidden": ([{"kind": "logits", "layer_weight": 0.5}, {"kind": "hidden"}], ()),
    "reverse": ([{"kind": "logits", "loss": "reverse_kl", "ce_weight": 0.3, "layer_weight": 0.1}], ()),
    "jsd": ([{"kind": "logits", "loss": "jsd", "jsd_beta": 0.3, "temperature": 2.0, "ce_weight": 0.5}], ()),
    "discrete": (
        [{"kind": "mixing", "loss": "frobenius"}, {"kind": "mixing"}, {"kind": "hidden"}, {"kind": "logits"}],
        ("student.mixer=discrete_mamba2", "student.layers=all"),
    ),
    "rest in the middle": (
        [{"kind": "logits", "optim": {"lr": 1e-3, "rest_lr": 1e-4}}, {"kind": "hidden", "target": "block"}], ()
    ),
    "as MOHAWK": (
        [{"kind": "mixing", "loss": "frobenius", "optim": {"kind": "adamw", "lr": 1e-3}},
         {"kind": "logits", "optim": {"kind": "adamw", "lr": 1e-3, "rest_lr": 1e-3, "decay_shape": "cosine"}}],
        ("student.mixer=discrete_mamba2", "stages.surgery.init=random"),
    ),
    "as MaTVLM": (
        [{"kind": "logits", "layer_weight": 1.0, "layer_loss": "frobenius", "layer_inputs": "teacher"}],
        ("stages.surgery.init=projections",),
    ),
    "cosine, late layers slower": (
        [{"kind": "hidden", "loss": "cosine", "optim": {"lr": 1e-3, "depth_ratio": 0.1}}], ()
    ),
    "several checkpoints": ([{"kind": "hidden", "checkpoint_every": 1, "keep": 2}], ()),
}  # fmt: skip


@pytest.mark.parametrize("name", list(VARIATIONS))
def test_stages_combine(tmp_path: Path, name: str) -> None:
    stages, overrides = VARIATIONS[name]
    run = with_stages(tmp_path / "run", stages, *overrides)
    assert len(losses(run)) == 2 * len(stages)
    assert all(math.isfinite(x) and x >= 0 for x in losses(run))
    assert len(list(run.glob("*/checkpoint-*"))) == len(stages) + (name == "several checkpoints")
    assert (run / "final" / "model.safetensors").is_file()
    tensors = [load_file(f / "student" / "student.safetensors") for f in sorted(run.glob("[0-9]*"))]
    for before, after in itertools.pairwise(tensors):
        assert any(not torch.equal(before[n], after[n]) for n in before)
    assert all(t.isfinite().all() for t in load_file(run / "final" / "model.safetensors").values())


def test_gradient_checkpointing_changes_memory_alone(tmp_path: Path) -> None:
    plain = with_stages(tmp_path / "plain", [{"kind": "logits", "layer_weight": 0.2}])
    saving = with_stages(tmp_path / "saving", [{"kind": "logits", "layer_weight": 0.2, "gradient_checkpointing": True}])
    a, b = (load_file(r / "final" / "model.safetensors") for r in (plain, saving))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)


def test_without_a_rate_for_the_rest_all_but_the_mixers_is_the_teachers(tmp_path: Path) -> None:
    run = with_stages(tmp_path / "run", [{"kind": "hidden"}, {"kind": "logits"}])
    final, teacher = load_file(run / "final" / "model.safetensors"), teacher_tensors()
    kept = [n for n in final if n in teacher]
    assert len(kept) > len(final) // 2
    assert [n for n in kept if not torch.equal(final[n], teacher[n])] == []
    small = load_file(run / "2-logits" / "student" / "student.safetensors")
    assert not any(n in teacher for n in small)


def test_with_a_rate_for_the_rest_all_is_trained_and_the_teacher_is_left_alone(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final, teacher = load_file(whole / "final" / "model.safetensors"), teacher_tensors()
    kept = [n for n in final if n in teacher]
    assert [n for n in kept if torch.equal(final[n], teacher[n])] == []
    assert "lm_head.weight" not in final
    seen: list[Any] = []
    original = logits.run_logits
    monkeypatch.setattr(pipeline, "run_logits", lambda ctx, *rest: (seen.append(ctx), original(ctx, *rest))[1])
    with_stages(tmp_path / "run", [{"kind": "logits", "optim": {"rest_lr": 1e-2}}])
    ctx = seen[0]
    assert all(torch.equal(p, teacher[n]) for n, p in ctx.teacher.named_parameters())
    assert ctx.student.get_output_embeddings().weight is ctx.student.get_input_embeddings().weight
    assert not torch.equal(ctx.student.get_input_embeddings().weight, teacher["model.embed_tokens.weight"])


def test_a_stage_reports_what_it_trained(whole: Path) -> None:
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    for stage in ("2-mixing", "3-hidden", "4-logits"):
        summary = json.loads((whole / stage / "DONE").read_text())["summary"]
        assert summary["steps"] == 5
        assert summary["tokens"] == 480
        own = [r["loss"] for r in records if r["stage"] == stage]
        assert [summary["first_loss"], summary["last_loss"]] == [own[0], own[-1]]


def test_the_loss_of_chat_data_counts_answers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask is of the predicted token: with it, distill_loss sees a token where and only where it carries loss."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def spy(*args: Any, mask_T: torch.Tensor, labels_T: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append((mask_T, labels_T))
        return distill_loss(*args, mask_T=mask_T, labels_T=labels_T, **options)

    def marked(data: Any, *args: int) -> Any:
        batch = original(data, *args)
        # only "e" carries loss, and of the first step nothing does
        return batch._replace(loss_mask_BL=(batch.tokens_BL == E) & (args[1] > 0))

    E = byte_tokenizer()("e").input_ids[0]
    original = PackedData.batch
    monkeypatch.setattr(PackedData, "batch", marked)
    monkeypatch.setattr(targets, "distill_loss", spy)
    run = with_stages(tmp_path / "run", [{"kind": "logits", "ce_weight": 0.5}])
    assert [len(mask) for mask, _ in seen] == [2 * 47, 2 * 47]
    assert not seen[0][0].any()
    assert seen[1][0].any()
    assert torch.equal(seen[1][0], seen[1][1] == E)
    assert losses(run)[0] == 0
    assert losses(run)[1] > 0


def test_final_loads_and_generates_in_a_fresh_process(whole: Path, tmp_path: Path) -> None:
    names = {p.name for p in (whole / "final").iterdir()}
    assert {"README.md", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    card = (whole / "final" / "README.md").read_text()
    assert "tiny-random-llama" in card
    assert "import ssmorph.hf" in card
    for first, options in (("import ssmorph.hf", ""), ("sys.modules['ssmorph'] = None", ", trust_remote_code=True")):
        code = (
            f"import sys, torch\n{first}\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            f"model = AutoModelForCausalLM.from_pretrained(sys.argv[1]{options})\n"
            f"tokenizer = AutoTokenizer.from_pretrained(sys.argv[1]{options})\n"
            "tokens = tokenizer('The class', return_tensors='pt').input_ids\n"
            "out = model.generate(tokens, max_new_tokens=12, do_sample=False, pad_token_id=258)\n"
            "print(sorted(model.mixers()), out.shape[1] - tokens.shape[1] > 0, model.generation_config.eos_token_id)\n"
        )
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(whole / "final")], capture_output=True,
                              text=True, timeout=120, check=False,
                              env={**os.environ, "HF_MODULES_CACHE": str(tmp_path)})  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == "[1, 3] True 257"


def test_the_run_keeps_its_recipe_and_environment(whole: Path) -> None:
    config = load_recipe(RECIPE, QUICK, run_dir=str(whole))
    assert load_recipe(whole / "config.yaml") == config
    assert build(yaml.safe_load(dump(config))) == config
    env = json.loads((whole / "env.json").read_text())
    assert env["threads"] == 1
    assert env["torch"] == torch.__version__
    assert [p.name for p in sorted(whole.glob("[0-9]*"))] == list(STAGES)


def test_alignment_losses_are_relative_and_flat_at_zero() -> None:
    taught = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    for kind, expected in (("l2", 0.5), ("mse", 0.25)):
        assert hidden.alignment_loss(0.5 * taught, taught, kind).item() == pytest.approx(expected, rel=1e-5)
        assert hidden.alignment_loss(50 * taught, 100 * taught, kind).item() == pytest.approx(expected, rel=1e-5)
        own = taught.clone().requires_grad_(True)
        hidden.alignment_loss(own, taught, kind).backward()
        assert own.grad is not None
        assert own.grad.abs().max() == 0


def test_the_cosine_is_of_directions_alone() -> None:
    taught = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    for factor, expected in ((3.0, 0.0), (-0.1, 2.0)):
        own = (factor * taught).requires_grad_(True)
        loss = hidden.alignment_loss(own, taught, "cosine")
        loss.backward()
        assert loss.item() == pytest.approx(expected, abs=1e-6)
        assert own.grad is not None
        assert own.grad.abs().max() < 1e-5
    silent = torch.zeros_like(taught).requires_grad_(True)
    hidden.alignment_loss(silent, taught, "cosine").backward()
    assert silent.grad is not None
    assert silent.grad.isfinite().all()


def test_the_depth_ratio_slows_the_layers_that_are_late(tmp_path: Path) -> None:
    moved = []
    for name, ratio in (("even", 1.0), ("late", 1e-6)):
        optim = {"lr": 1e-3, "depth_ratio": ratio}
        run = with_stages(tmp_path / name, [{"kind": "hidden", "optim": optim}])
        before, after = (load_file(run / s / "student" / "student.safetensors") for s in ("0-surgery", "1-hidden"))
        moved.append([(after[n] - before[n]).abs().max() for n in after if n.endswith("in_proj.weight")])
    # layers 1 and 3 of 4: a third of the way, and the last
    assert min(moved[0]) > 1e-5
    assert moved[1][1] < 1e-4 * moved[0][1]
    assert 1e-3 * moved[0][0] < moved[1][0] < 0.1 * moved[0][0]


@pytest.mark.slow
def test_wandb_writes_an_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = run_tiny(tmp_path / "run", "tracker=wandb", until="mixing")
    files = list(run.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 1
    assert files[0].stat().st_size > 0
