"""Teachers of a logits stage beside the converted one: what they add up to, what is refused, and resuming."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM

from ssmorph.convert.families import family_of
from ssmorph.convert.tiny import byte_tokenizer, strengthen
from ssmorph.errors import UserError
from ssmorph.stages import loop
from ssmorph.stages.config import LogitsStage, StageTeacher
from ssmorph.stages.data import TokenBatch
from ssmorph.stages.planning import plan_of
from ssmorph.stages.recipe import load_recipe
from ssmorph.stages.targets import Live, end_of, final_states
from tests.models import tiny_hybrid, tiny_teacher

from .tiny_run import QUICK, RECIPE, in_child, outcome, run_tiny


def save_teacher(folder: Path, *, vocab_size: int = 260, seed: int = 5) -> Path:
    """Another family, wider, with a soft cap on its logits, and the same tokenizer."""
    config = Gemma2Config(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, final_logit_softcapping=3.0,
        bos_token_id=256, eos_token_id=257, pad_token_id=258,
    )  # fmt: skip
    strengthen(Gemma2ForCausalLM(config), seed=seed).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("larger") / "model")


def both(larger: Path) -> str:
    return f"stages.logits.teachers=[{{source: {larger}, weight: 3}}, {{source: self, weight: 1}}]"


def context(**values: Any) -> Any:
    teacher = tiny_teacher()
    made = {"student": tiny_hybrid(teacher=teacher), "teacher": teacher, "spec": family_of(teacher.config)}
    return SimpleNamespace(**made, config=SimpleNamespace(device="cpu"), say=lambda _line: None, **values)


@torch.no_grad()
def logs(model: Any, tokens_BL: Tensor, vocabulary: int = 260) -> Tensor:
    logits_TV: Tensor = model(tokens_BL, use_cache=False).logits[:, :-1, :vocabulary].flatten(0, 1)
    return logits_TV


@pytest.mark.parametrize("padded", [260, 264])
def test_the_target_is_the_mean_of_the_models_own_logits(tmp_path: Path, padded: int) -> None:
    """Each with its family's soft cap; what a larger vocabulary is padded with does not count."""
    folder = save_teacher(tmp_path / "model", vocab_size=padded)
    ctx, tokens = context(), torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(3))
    stage = LogitsStage(teachers=(StageTeacher(source=str(folder), weight=3.0), StageTeacher()))
    live = Live(ctx, stage)
    batch = TokenBatch(tokens, torch.ones_like(tokens, dtype=torch.bool), 0)
    student = end_of(ctx.student, (1.0, None), final_states(ctx.student, tokens), live.vocabulary)
    loss = live.read(batch)(student, tokens[:, 1:].flatten(), torch.ones(22, dtype=torch.bool))
    other, own = (logs(model, tokens) for model in (live.guides[0].model, ctx.teacher))
    assert other.abs().max() <= 3.0 < own.abs().max()
    mean = (0.75 * other + 0.25 * own).log_softmax(-1)
    expected = F.kl_div(logs(ctx.student, tokens).log_softmax(-1), mean, log_target=True, reduction="batchmean")
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)


def test_a_teacher_alone_replaces_the_converted_one(tmp_path: Path, larger: Path) -> None:
    same = save_copy(tmp_path / "same")
    plain, copy = run_tiny(tmp_path / "plain"), run_tiny(tmp_path / "a", f"stages.logits.teachers=[{{source: {same}}}]")
    other = run_tiny(tmp_path / "b", f"stages.logits.teachers=[{{source: {larger}}}]")
    metrics = [(run / "metrics.jsonl").read_text() for run in (plain, copy, other)]
    assert metrics[0] == metrics[1] != metrics[2]


def save_copy(folder: Path) -> Path:
    """The tiny recipe's own teacher under another name."""
    tiny_teacher().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_layer_term_needs_the_converted_teacher_and_runs_it(tmp_path: Path, larger: Path) -> None:
    change = f"stages.logits.teachers=[{{source: {larger}}}]"
    runs = [run_tiny(tmp_path / f"{w}", change, f"stages.logits.layer_weight={w}") for w in (0.0, 0.5)]
    first = [json.loads((run / "4-logits" / "DONE").read_text())["summary"]["first_loss"] for run in runs]
    assert first[1] > first[0] > 0


def test_a_killed_stage_of_two_teachers_resumes_exactly(
    tmp_path: Path, larger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, run = run_tiny(tmp_path / "whole", both(larger)), tmp_path / "run"
    run_tiny(run, both(larger), until="hidden")
    original, calls = loop.set_rate, [0]

    def fatal(*args: Any) -> None:
        calls[0] += 1
        if calls[0] == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "set_rate", fatal)
        assert in_child(lambda: run_tiny(run, both(larger))) == -signal.SIGKILL
    said: list[str] = []
    run_tiny(run, both(larger), say=said.append)
    assert "4-logits: resumed at step 2 of 5" in said
    assert outcome(run) == outcome(whole)


def test_another_vocabulary_is_refused_before_weights_are_read(
    tmp_path: Path, larger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any, **__: Any) -> nn.Module:
        raise AssertionError("weights were read")

    monkeypatch.setattr("ssmorph.stages.pipeline.load_teacher", read)
    model = Path(shutil.copytree(larger, tmp_path / "model"))
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<more>")])
    tokenizer.save_pretrained(model)
    with pytest.raises(UserError, match=r"stages\[4\]\.teachers\[0\]: must have the converted teacher's vocabulary; "
                                        r"got .*model, where 1 tokens differ, first '<more>'"):  # fmt: skip
        run_tiny(tmp_path / "run", both(model))
    small = Path(shutil.copytree(larger, tmp_path / "small"))
    tree = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**tree, "vocab_size": 258, "pad_token_id": None}))
    with pytest.raises(UserError, match=r"teachers\[0\]: must have embeddings for 259 tokens; got 258"):
        run_tiny(tmp_path / "run", both(small))
    with pytest.raises(UserError, match=r"teacher\.source: must be a folder.*nowhere"):
        run_tiny(tmp_path / "run", both(Path("nowhere")))


@pytest.mark.parametrize(
    ("teachers", "message"),
    [
        ("[]", r"stages\[4\]\.teachers: needs one or more"),
        ("[{source: a}, {source: a}]", r"each once; got \['a', 'a'\]"),
        ("[{weight: 0}]", r"stages\[4\]\.teachers\[0\]\.weight: must be positive"),
        ("[{weigth: 1}]", r"teachers\[0\]\.weigth: unknown key.*'weight'"),
    ],
)
def test_mistakes_in_the_list_are_named(teachers: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(RECIPE, [f"stages.logits.teachers={teachers}"])


def test_the_plan_counts_teachers(larger: Path) -> None:
    plain, two = (plan_of(load_recipe(RECIPE, [*QUICK, *more]))["estimate"] for more in ((), (both(larger),)))
    assert two["stages"]["4-logits"]["pflop"] > plain["stages"]["4-logits"]["pflop"]
    assert two["stages"]["3-hidden"] | {"minutes": 0} == plain["stages"]["3-hidden"] | {"minutes": 0}
