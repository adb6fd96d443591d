"""Other people's tools on hybrids: Trainer, PEFT, pipeline and torch.compile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments, pipeline

import ssmorph.hf  # noqa: F401  registers the classes
from ssmorph.convert.tiny import byte_tokenizer
from tests.families.hybrids import KINDS, close, some_layers, tokens
from tests.models import WINDOWED_HEADS

FAMILIES = ("llama", "gemma3")
ON_BOTH = [(row, kind) for row in FAMILIES for kind in KINDS]


def rows() -> list[dict[str, Any]]:
    """Eight sequences, learnt again and again."""
    return [{"input_ids": row, "labels": row} for row in tokens(8, 24)]


@pytest.mark.parametrize(("row", "kind"), ON_BOTH)
def test_trainer_lowers_the_loss(row: str, kind: str, tmp_path: Path) -> None:
    model = some_layers(row, kind).requires_grad_(True)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=8, learning_rate=3e-3, logging_steps=1,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        *((kind, part) for kind in (*KINDS, "windowed_mamba2", "mamba2_heads") for part in ("", "layers.3.")),
        *((kind, "layers.3.self_attn.state.") for kind in ("windowed_mamba2", WINDOWED_HEADS)),
    ],
)
def test_one_token_behind_a_cache_has_the_gradients_of_the_whole(kind: str, part: str) -> None:
    """Of all parameters, and of one layer's alone, whose inputs then have none."""
    model, x = some_layers("llama", kind), tokens(2, 21)
    own = {name: p.requires_grad_() for name, p in model.named_parameters() if part in name}
    cache = model(x[:, :20], use_cache=True).past_key_values
    both = model(x[:, 20:], past_key_values=cache).logits, model(x, use_cache=False).logits[:, 20:]
    found = [torch.autograd.grad(logits.square().mean(), list(own.values()), allow_unused=True) for logits in both]
    for name, gradient, expected in zip(own, *found, strict=True):
        assert (gradient is None) == (expected is None), name
        assert expected is None or (gradient - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-9, name


# PEFT asks for transformers' old name of it
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize(("row", "kind"), ON_BOTH)
def test_lora_lowers_the_loss_and_is_merged(row: str, kind: str) -> None:
    lora = LoraConfig(r=8, lora_alpha=32, target_modules=["in_proj", "out_proj", "q_proj"], task_type="CAUSAL_LM")
    model: Any = get_peft_model(some_layers(row, kind), lora)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert {"in_proj", "out_proj", "q_proj"} <= {part for name in trained for part in name.split(".")}
    assert all("lora_" in name for name in trained)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x, losses = tokens(8, 24), []
    model.train()
    for _ in range(12):
        loss = model(input_ids=x, labels=x).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=x).logits
        assert close(model.merge_and_unload()(x).logits, expected)


@pytest.mark.parametrize(("row", "kind"), ON_BOTH)
def test_the_text_pipeline(row: str, kind: str) -> None:
    model = some_layers(row, kind)
    tokenizer = byte_tokenizer()
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    found = writer(["One two.", "A"], max_new_tokens=6, do_sample=False, return_full_text=False, batch_size=2)
    assert len(found) == 2
    assert all(isinstance(each[0]["generated_text"], str) for each in found)


# torch.compile itself makes an instance of each autograd function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize(("row", "kind"), [("llama", "mamba2"), ("gemma3", "discrete_mamba2")])
def test_compiled_equals_eager(row: str, kind: str) -> None:
    model = some_layers(row, kind)
    x = tokens(2, 16)
    expected = model(x, use_cache=False).logits
    assert close(torch.compile(model, backend="aot_eager")(x, use_cache=False).logits, expected)
