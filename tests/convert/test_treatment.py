"""What a plan says of each family's features, against what the tiny models of all families have."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from ssmorph.convert.families import family_of
from ssmorph.convert.treatment import Treatment, name_layers, treatments
from tests.families.tiny import ROWS, family_config, family_teacher

ALL = range(4)


def of(row: str, layers: Sequence[int] = ALL, mixer: str = "mamba2") -> dict[str, Treatment]:
    config = family_config(row)
    found = treatments(family_of(config), config, layers, mixer)
    assert len({t.feature for t in found}) == len(found)
    return {t.feature: t for t in found}


def words(rows: dict[str, Treatment]) -> dict[str, str]:
    return {feature: row.treatment for feature, row in rows.items()}


def test_a_plain_family_loses_softmax_rope_and_scale() -> None:
    assert words(of("llama")) == {
        "grouped heads": "exact", "attention scale": "dropped", "softmax": "dropped", "RoPE": "dropped",
        "embeddings": "exact", "norms of layers": "exact", "MLPs": "exact",
    }  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_rows_say_what_the_weights_have(row: str) -> None:
    teacher, found = family_teacher(row), of(row)
    spec = family_of(teacher.config)
    attention = spec.attention(teacher, 0)
    query = spec.projections(attention, teacher.config).query
    assert ("q/k/v biases" in found) == (query.bias is not None)
    assert ("output bias" in found) == (attention.get_submodule(spec.out).bias is not None)
    normed = spec.query_norm is not None and getattr(attention, spec.query_norm, None) is not None
    assert (words(found).get("norm of queries and keys") == "approximated") == normed
    experts = any("experts" in name for name, _ in teacher.named_modules())
    assert (("experts and router" in found), ("MLPs" in found)) == (experts, not experts)


@pytest.mark.parametrize(
    ("row", "feature", "treatment", "note"),
    [
        ("mistral", "sliding window", "dropped", "7 tokens in layers 0-3"),
        ("qwen2", "sliding window", "dropped", "7 tokens in layers 2-3"),
        ("gemma2", "sliding window", "dropped", "7 tokens in layers 0, 2;"),
        ("gemma2", "soft cap of scores", "dropped", "it was 50"),
        ("gemma2", "soft cap of logits", "exact", "30"),
        ("phi", "RoPE", "dropped", "50% of a head's channels"),
        ("phi", "output bias", "exact", "copied"),
        ("smollm3", "RoPE", "dropped", "100% of a head's channels in layers 0-2"),
        ("smollm3", "layers without RoPE", "exact", "none in layer 3"),
        ("mixtral", "experts and router", "exact", "3 in a layer"),
        ("granite", "residual multiplier", "exact", "0.7"),
        ("granite", "logits multiplier", "exact", "0.5"),
        ("falcon-7b", "grouped heads", "exact", "1 key/value heads are repeated to 6"),
    ],
)
def test_features_are_named_with_their_numbers(row: str, feature: str, treatment: str, note: str) -> None:
    found = of(row)[feature]
    assert found.treatment == treatment
    assert note in found.note


def test_only_the_mixer_without_a_norm_keeps_the_scale() -> None:
    assert of("granite", mixer="discrete_mamba2")["attention scale"][1:] == ("exact", "the factor 0.2 goes into C")
    assert of("granite")["attention scale"].treatment == "dropped"


def test_mixers_with_a_window_keep_the_attention_inside_it() -> None:
    found = {kind: words(of("gemma3", mixer=kind)) for kind in ("windowed_mamba2", "window")}
    behind = {kind: rows["attention behind the window"] for kind, rows in found.items()}
    assert behind == {"windowed_mamba2": "approximated", "window": "dropped"}
    assert words(of("gemma3", mixer="window"))["attention inside the window"] == "exact"
    assert not words(of("gemma3", mixer="window")).keys() & {"RoPE", "softmax", "norm of queries and keys"}


def test_rows_are_of_the_converted_layers_alone() -> None:
    assert "sliding window" not in of("gemma2", [1, 3])
    assert "RoPE" not in of("smollm3", [3])
    assert {t.treatment for t in of("gemma2", []).values()} == {"exact"}


@pytest.mark.parametrize(
    ("layers", "text"), [([3], "layer 3"), ([0, 1, 2, 4], "layers 0-2, 4"), ([1, 3, 4], "layers 1, 3-4")]
)
def test_layers_are_named_in_runs(layers: list[int], text: str) -> None:
    assert name_layers(layers) == text
