"""The evaluator's numbers against the model's own logits, and questions that any tokenizer can be asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ssmorph.convert.families import family_of, logits_of
from ssmorph.errors import UserError
from ssmorph.stages.evaluate import _reached
from ssmorph.stages.logits import checkpointed
from ssmorph.stages.probes import TASKS, make_task
from ssmorph.stages.retrieval import make_probes, told_apart
from ssmorph.stages.scores import Candidate, score
from tests.families.hybrids import tokens
from tests.families.tiny import family_teacher
from tests.models import starting_tokenizer, tiny_hybrid


# granite scales its logits, gemma2 caps them
@torch.no_grad()
@pytest.mark.parametrize("row", ["llama", "granite", "gemma2"])
def test_scores_are_of_the_logits_that_the_model_gives(row: str) -> None:
    teacher = family_teacher(row)
    hybrid, text = tiny_hybrid("mamba2", (1,), teacher), tokens(1, 40)
    own, taught = (model(text).logits[0, :-1].log_softmax(-1) for model in (hybrid, teacher))
    torch.testing.assert_close(logits_of(hybrid, hybrid.base_model(text).last_hidden_state), hybrid(text).logits)
    rows = {name: s.summary() for name, s in score(teacher, [Candidate("hybrid", hybrid)], text).items()}
    assert rows["hybrid"]["kl"] == pytest.approx(float(F.kl_div(own, taught, log_target=True, reduction="batchmean")))
    for name, log_p in (("teacher", taught), ("hybrid", own)):
        assert rows[name]["perplexity"] == pytest.approx(float(F.nll_loss(log_p, text[0, 1:]).exp()), rel=1e-5)


class Pieces:
    """A tokenizer of words; the space before one is a token of its own, or belongs to it, or letters are tokens."""

    bos_token_id = None

    def __init__(self, how: str) -> None:
        self.how, self.ids = how, dict[str, int]()

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        assert not add_special_tokens
        if self.how == "letters":
            pieces = list(text)
        else:
            marked = text.replace(" ", " _" if self.how == "joined" else " _ ")
            pieces = [p for line in marked.split("\n") for p in (*line.split(" "), "\n") if p]
        return type("Encoded", (), {"input_ids": [self.ids.setdefault(p, len(self.ids)) for p in pieces]})


@pytest.mark.parametrize("how", ["joined", "apart", "letters"])
def test_answers_are_told_apart_in_any_tokenizer(how: str) -> None:
    tokenizer, filler = Pieces(how), torch.arange(5000, 5300)
    asked = [p for task in TASKS for p in make_task(task, tokenizer, filler, 200, 0.5, 6, seed=0)]
    for probe in [*asked, *make_probes(tokenizer, filler, 64, 6, seed=0)]:
        assert len(set(probe.choices)) == 4
        # what the answers share has been said
        assert (int(probe.tokens_L[-1]) == tokenizer.ids.get("_", -1)) == (how == "apart")


def test_every_question_begins_as_the_tokenizer_begins_a_text() -> None:
    tokenizer, filler = starting_tokenizer(), torch.arange(97, 123).repeat(12)
    start = tokenizer.bos_token_id
    asked = [p for task in TASKS for p in make_task(task, tokenizer, filler, 300, 0.0, 2, seed=0)]
    for probe in [*asked, *make_probes(tokenizer, filler, 64, 2, seed=0)]:
        assert (probe.tokens_L == start).nonzero().tolist() == [[0]]
    assert {len(p.tokens_L) for p in asked} == {300}


def test_a_tokenizer_that_knows_no_city_is_refused() -> None:
    class Blind(Pieces):
        def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
            return type("Encoded", (), {"input_ids": [0] * len(text.split())})

    assert told_apart(Blind("letters"), "it is", ["Rome", "Oslo"]) is None
    with pytest.raises(UserError, match="four cities must differ in one token"):
        make_probes(Blind("letters"), torch.arange(100), 8, 1, seed=0)


def test_lengths_that_nothing_fills_are_left_out_by_name() -> None:
    said: list[str] = []
    assert _reached("tasks", (64, 256, 1024), 300, said.append) == [64, 256]
    assert said == ["evaluate: tasks at 1024 tokens left out, for 300 tokens are held out"]


def test_checkpointed_activations_leave_dropout_off() -> None:
    hybrid = tiny_hybrid("mamba2", (1,), family_teacher("phi"))
    dropouts = [module for module in hybrid.modules() if isinstance(module, torch.nn.Dropout)]
    assert dropouts
    for module in dropouts:
        module.p = 0.5
    spec = family_of(hybrid.config.text_config)
    text, blocks = tokens(1, 20), spec.decoder_layers(hybrid)
    expected = hybrid(text).logits
    with checkpointed(hybrid, spec):
        assert all(block.training and block.gradient_checkpointing for block in blocks)
        assert torch.equal(hybrid(text).logits, expected)
    assert not any(module.training for module in hybrid.modules())
