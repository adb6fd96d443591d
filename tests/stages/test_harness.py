"""Suites of lm-eval tasks: offline, on tiny models, and what they say where something is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ssmorph import cli, verbs
from ssmorph.convert.tiny import byte_tokenizer
from ssmorph.errors import UserError
from ssmorph.stages.report import tasks_table
from ssmorph.stages.retrieval_tasks import DOCUMENTS, write_tasks
from tests.models import tiny_hybrid, tiny_teacher

CHOICE = """
task: parity
dataset_path: json
dataset_kwargs: {data_files: {test: parity.jsonl}}
test_split: test
fewshot_split: test
num_fewshot: 2
output_type: multiple_choice
doc_to_text: text
doc_to_choice: choices
doc_to_target: right
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {chance: 0.5}
"""
WRITING = """
task: writing
dataset_path: json
dataset_kwargs: {data_files: {test: parity.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: text
doc_to_target: "{{choices[right]}}"
generation_kwargs: {until: ["x"], max_gen_toks: 3}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """A folder as a user writes it: one choice of two words, and one text of three tokens."""
    folder = tmp_path / "mine"
    folder.mkdir()
    rows = [{"text": f"{n} is", "choices": ["even", "odd"], "right": n % 2} for n in range(12)]
    (folder / "parity.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "parity.yaml").write_text(CHOICE)
    (folder / "writing.yaml").write_text(WRITING)
    return folder


@pytest.fixture
def harness() -> Any:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed; `make harness` installs it and runs these tests")
    from ssmorph.stages import harness

    return harness


def test_teacher_and_hybrid_answer_the_same_documents(harness: Any, suite: Path) -> None:
    teacher = tiny_teacher()
    tasks = harness.tasks_from(suite)
    assert list(tasks) == ["parity", "writing"]
    same = harness.compare(teacher, teacher, byte_tokenizer(), tasks, batch=3)
    assert [row["difference"] for row in same["rows"]] == [0, 0]
    assert all(row["teacher"] == row["hybrid"] for row in same["rows"])
    report = harness.compare(teacher, tiny_hybrid(teacher=teacher), byte_tokenizer(), tasks, limit=8)
    row = report["rows"][0]
    assert (row["task"], row["metric"], row["few_shot"], row["documents"]) == ("parity", "acc", 2, 8)
    share = row["teacher"]["value"]
    assert row["teacher"]["stderr"] == pytest.approx((share * (1 - share) / 7) ** 0.5)
    assert row["difference"] == row["hybrid"]["value"] - share
    assert [len(column._cells) for column in tasks_table({"suite": "mine", **report}).columns] == [2] * 7


def test_answers_are_the_models_own(harness: Any, suite: Path) -> None:
    teacher, tokenizer = tiny_teacher(), byte_tokenizer()
    (suite / "parity.yaml").write_text(CHOICE.replace("num_fewshot: 2", "num_fewshot: 0"))
    hybrid = tiny_hybrid(teacher=teacher)
    report = harness.compare(teacher, hybrid, tokenizer, harness.tasks_from(suite / "parity.yaml"), batch=5)
    for name, model in (("teacher", teacher), ("hybrid", hybrid)):
        hits = 0
        for n in range(12):
            scores = [_likelihood(model, tokenizer, f"{n} is", f" {word}") for word in ("even", "odd")]
            hits += scores.index(max(scores)) == n % 2
        assert report["rows"][0][name]["value"] == pytest.approx(hits / 12)


@torch.no_grad()
def _likelihood(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    tokens = tokenizer(prompt + answer, return_tensors="pt").input_ids
    start = len(tokenizer(prompt).input_ids)
    log_probs = model(tokens).logits[0, start - 1 : -1].log_softmax(-1)
    return float(log_probs.gather(-1, tokens[0, start:, None]).sum())


def test_a_run_is_measured_with_both_offline_suites(
    harness: Any, suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    words = ["data.max_tokens=4000", "evaluate.tokens=96", "evaluate.controls=false"]
    tiny = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")
    assert cli.run(["convert", tiny, 'stages=[{"kind": "surgery"}]', *words, "--run-dir", run, "--quiet"]) == 0
    for name, first in ((str(suite), "parity"), ("retrieval", "copy_64")):
        assert cli.run(["eval", run, "--suite", name, "--limit", "2"]) == 0
        assert first in capsys.readouterr().out
        report = json.loads((Path(run) / f"lm-eval-{Path(name).stem}.json").read_text())
        assert report["rows"][0]["task"] == first
        assert report["rows"][0]["documents"] == 2


def test_all_missing_data_sets_are_named(harness: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"allenai/winogrande.*baber/piqa.*EleutherAI/lambada_openai.*HF_HOME"):
        harness.mohawk_tasks()


# one document each, in the columns that the tasks read
CHOICES = {"label": ["A", "B"], "text": ["warm", "cold"]}
STAND_INS = {
    "allenai/winogrande": {"sentence": "The _ is warm.", "option1": "sun", "option2": "ice", "answer": "1"},
    "allenai/ai2_arc": {"question": "What is ice?", "choices": CHOICES, "answerKey": "B"},
    "baber/piqa": {"goal": "To cool a drink,", "sol1": "add ice", "sol2": "add fire", "label": 0},
    "Rowan/hellaswag": {"ctx_a": "She pours tea.", "ctx_b": "then she", "activity_label": "Tea", "label": "1",
                        "endings": ["flies.", "drinks.", "sinks.", "rusts."]},
    "EleutherAI/lambada_openai": {"text": "the cold tea was full of ice"},
}  # fmt: skip


def test_the_papers_tasks_run_on_data_of_their_form(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def stand_in(path: str, **_: Any) -> Any:
        rows = datasets.Dataset.from_list([STAND_INS[path]] * 3)
        return datasets.DatasetDict({"train": rows, "validation": rows, "test": rows})

    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    teacher = tiny_teacher()
    report = harness.compare(teacher, tiny_hybrid(teacher=teacher), byte_tokenizer(), harness.mohawk_tasks())
    assert tuple(dict.fromkeys(row["task"] for row in report["rows"])) == harness.MOHAWK
    assert [row["metric"] for row in report["rows"] if row["task"] == "lambada_openai"] == ["perplexity", "acc"]
    assert all(row["teacher"]["stderr"] == pytest.approx(0) for row in report["rows"])


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("parity.yaml", "task: [", "must be a task"),
        ("parity.jsonl", None, "parity.jsonl"),
        ("parity.yaml", "a: 1", "a"),
    ],
)
def test_a_task_that_cannot_be_loaded_is_named(
    harness: Any, suite: Path, file: str, content: str | None, words: str
) -> None:
    (suite / file).unlink() if content is None else (suite / file).write_text(content)
    with pytest.raises(UserError, match=words) as raised:
        harness.tasks_from(suite)
    assert "parity.yaml" in str(raised.value)


def test_retrieval_tasks_are_deterministic_and_hold_their_answers(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    filler = torch.tensor(tokenizer("The sea was calm and the harbour lay still. " * 40).input_ids)
    written = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        assert write_tasks(folder, tokenizer, filler, 1000, seed=0) == [64, 256]
        written.append({file.name: file.read_text() for file in folder.iterdir()})
    assert written[0] == written[1]
    assert len(written[0]) == 2 * 2 * 6
    documents = {name: [json.loads(line) for line in text.splitlines()]
                 for name, text in written[0].items() if name.endswith(".jsonl")}  # fmt: skip
    assert all(len(rows) == DOCUMENTS for rows in documents.values())
    for document in documents["multikey_256.jsonl"]:
        name = document["text"].rsplit("above, ", 1)[1].split()[0]
        assert f"{name} lives in {document['choices'][document['right']]}." in document["text"]
    for depth in (0, 50, 100):
        text = documents[f"needle_256_at_{depth}.jsonl"][0]["text"]
        assert text.index(" lives in ") / text.index("\n\n") == pytest.approx(depth / 100, abs=0.12)
    for document in documents["copy_256.jsonl"]:
        first, again = document["text"].split("\n\n")
        assert first.startswith(again + document["target"])


def test_a_model_too_short_for_retrieval_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs 64 tokens of filler"):
        write_tasks(tmp_path, byte_tokenizer(), torch.zeros(70, dtype=torch.int64), 100, seed=0)


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("ssmorph.stages.harness.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'ssmorph\[eval\]'"):
        verbs.evaluate_run(tmp_path, "mohawk")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"suite": "mohwak"}, "Did you mean 'mohawk'"),
        ({"suite": "short", "limit": 3}, "--tokens"),
        ({"suite": "retrieval", "tokens": 3}, "--limit"),
        ({"suite": "retrieval", "limit": 0}, "1 or more"),
    ],
)
def test_options_of_the_other_kind_of_suite_are_refused(tmp_path: Path, options: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        verbs.evaluate_run(tmp_path, **options)
