"""Hybrids as transformers' own granitemoehybrid: the same logits, or a refusal that says what it lacks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GraniteMoeHybridForCausalLM
from transformers.models.granitemoehybrid import modeling_granitemoehybrid as stock

from ssmorph import cli, verbs
from ssmorph.convert.export.granite import obstacles, stock_of
from ssmorph.convert.families import family_of
from ssmorph.convert.teachers import load_tokenizer
from ssmorph.errors import UserError
from tests.families.hybrids import close, tokens
from tests.families.tiny import GQA, ROWS, family_config, family_teacher
from tests.models import choice_of, tiny_hybrid

# rows of the other tests have windows that the stock architecture lacks
WITHOUT_WINDOWS = {"mistral": {**GQA, "sliding_window": None}, "qwen2": GQA}
FITS = ("llama", "llama3", "mistral", "qwen2", "granite")


def fitting(row: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A hybrid that can be exported, layers 1 and 3 converted, in eval mode and frozen."""
    if row in WITHOUT_WINDOWS:
        monkeypatch.setitem(ROWS, row, (row, WITHOUT_WINDOWS[row]))
    return tiny_hybrid("mamba2", (1, 3), family_teacher(row)).requires_grad_(False)


@torch.no_grad()
@pytest.mark.parametrize("row", FITS)
def test_the_stock_model_says_the_same(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hybrid = fitting(row, monkeypatch)
    own = stock_of(hybrid)
    assert type(own) is GraniteMoeHybridForCausalLM
    assert (own.lm_head.weight is own.model.embed_tokens.weight) == hybrid.config.tie_word_embeddings
    assert sum(p.numel() for p in own.parameters()) >= sum(p.numel() for p in hybrid.parameters())
    text, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[0, :5] = 0
    expected = hybrid(text, attention_mask=mask).logits
    assert close(own(text, attention_mask=mask).logits[mask.bool()], expected[mask.bool()])
    cache, answers = own(text[:, :30], attention_mask=mask[:, :30], use_cache=True).past_key_values, []
    for end in range(31, 41):
        step = own(text[:, end - 1 : end], attention_mask=mask[:, :end], past_key_values=cache)
        answers.append(step.logits)
    assert close(torch.cat(answers, 1), expected[:, 30:])


@pytest.mark.parametrize(
    ("row", "kind", "lacks"),
    [
        ("qwen3", "mamba2", "decoder layers are not those of qwen3"),
        ("llama", "windowed_mamba2", "converted layers are mamba2, not windowed_mamba2"),
        ("llama", "discrete_mamba2", "converted layers are mamba2, not discrete_mamba2"),
        ("mistral", "mamba2", "48 wide in all, not 6 x 12"),
        ("mistral", "mamba2", "no sliding window"),
        ("mixtral", "mamba2", "experts"),
    ],
)
def test_what_is_lacking_has_a_name(row: str, kind: str, lacks: str) -> None:
    hybrid = tiny_hybrid(kind, (1, 3), family_teacher(row))
    config = hybrid.config.text_config
    assert any(lacks in reason for reason in obstacles(config, family_of(config), hybrid.config.layers()))


@pytest.mark.parametrize(("change", "lacks"), [({"hidden_act": "gelu"}, "silu, not gelu"), ({"mlp_bias": True}, "MLP")])
def test_mlps_that_differ_are_named(change: dict[str, Any], lacks: str) -> None:
    config = family_config("llama")
    config.update(change)
    shape = tiny_hybrid(choice_of("mamba2").kind).mixers()[1].shape
    (reason,) = obstacles(config, family_of(config), {1: ("mamba2", shape)})
    assert lacks in reason


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hybrid on disk with a tokenizer and a card, as a run leaves it."""
    final = tmp_path / "run" / "final"
    fitting("llama", monkeypatch).save_pretrained(final)
    load_tokenizer("tiny-random-llama").save_pretrained(final)
    (final / "README.md").write_text("How to load it here\n## Data\n- some text\n")
    return final.parent


@torch.no_grad()
def test_the_folder_loads_without_this_package(folder: Path, tmp_path: Path) -> None:
    out = verbs.export(folder, say=lambda text: None)
    assert out == folder / "granitemoehybrid"
    config = json.loads((out / "config.json").read_text())
    assert config["layer_types"] == ["attention", "mamba"] * 2
    assert config["rope_theta"] == 1e4
    card = (out / "README.md").read_text()
    assert "5.23" in card
    assert "some text" in card
    assert "How to load it here" not in card
    proof = json.loads((out / "parity.json").read_text())
    assert 0 < proof["full"] < 1e-4
    assert 0 < proof["decoded"] < 1e-4
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(out)!r})\n"
        "ids = torch.arange(24).view(1, -1)\n"
        "answers = model(ids).logits, model.generate(ids, max_new_tokens=8, do_sample=False)\n"
        f"torch.save(answers, {str(tmp_path / 'x')!r})\n"
        f"print(type(model).__name__, len(AutoTokenizer.from_pretrained({str(out)!r})), 'ssmorph' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == ["GraniteMoeHybridForCausalLM", str(len(AutoTokenizer.from_pretrained(out))), "False"]
    hybrid = AutoModelForCausalLM.from_pretrained(folder / "final")
    logits, generated = torch.load(tmp_path / "x", weights_only=True)
    ids = torch.arange(24).view(1, -1)
    assert close(logits, hybrid(ids).logits)
    assert torch.equal(generated, hybrid.generate(ids, max_new_tokens=8, do_sample=False))


def test_an_export_keeps_the_dtype_and_replaces_a_former_one(folder: Path) -> None:
    half = AutoModelForCausalLM.from_pretrained(folder / "final", dtype=torch.bfloat16)
    half.save_pretrained(folder / "final")
    for _ in range(2):
        out = verbs.export(folder, say=lambda text: None)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_other_logits_stop_the_export(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ungrouped(self: Any, hidden: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """As transformers before 5.23 has it: one norm over all heads."""
        hidden = hidden * torch.nn.functional.silu(gate)
        return self.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(stock.GraniteMoeHybridRMSNormGated, "forward", ungrouped)
    with pytest.raises(UserError, match="logits must agree"):
        verbs.export(folder, say=lambda text: None)
    assert not (folder / "granitemoehybrid").exists()


def test_mistakes_are_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "used").mkdir()
    tiny_hybrid("discrete_mamba2").save_pretrained(tmp_path / "other")
    for words, message in [
        ([str(tmp_path / "none")], "must be a finished run or a hybrid's folder"),
        ([str(folder / "final")], "needs --out"),
        ([str(folder), "--out", str(tmp_path / "used")], "must not exist, or be a former export"),
        ([str(tmp_path / "other"), "--out", str(tmp_path / "new")], "converted layers are mamba2, not discrete_mamba2"),
    ]:
        assert cli.run(["export", *words]) == 2
        assert message in capsys.readouterr().err
    assert list((tmp_path / "used").iterdir()) == []
    assert not (tmp_path / "new").exists()
