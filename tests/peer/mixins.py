"""transformers' ModelTesterMixin and GenerationTesterMixin on our hybrids, and on a plain Llama as a control.

`make peer-tests` runs this file; its name keeps it out of `make test`, which has no checkout of transformers.
"""

from __future__ import annotations

import unittest
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

import ssmorph.hf  # noqa: F401  registers the classes
from ssmorph.convert.families import family_of
from ssmorph.convert.modeling import SsmorphConfig, hybrid_class
from ssmorph.convert.surgery import faithful_shape
from tests.families.tiny import ROWS
from tests.peer.suite import GenerationTesterMixin, ModelTesterMixin

# the suite wants two layers, and windows longer than its inputs; larger weights let states and caches move the logits
CHANGES = {"num_hidden_layers": 2, "initializer_range": 0.1}
WINDOW = 64


def plain_config(row: str) -> Any:
    """A teacher's config."""
    model_type, values = ROWS[row]
    window = {"sliding_window": WINDOW} if values.get("sliding_window") else {}
    return AutoConfig.for_model(model_type, **{**values, **CHANGES, **window})


def hybrid_config(row: str, kind: str, layers: tuple[int, ...]) -> SsmorphConfig:
    """A hybrid's config, with the sizes of a faithful copy."""
    text = plain_config(row)
    spec = family_of(text)
    shape = faithful_shape(spec.shape(text), conv_kernel=4).as_dict()
    converted = {str(i): {"kind": kind, "shape": shape} for i in layers}
    return SsmorphConfig(
        text_config=text, converted=converted, places={"layers": spec.layers, "mixer": spec.mixer}, ssmorph_version="0"
    )


class Tester:
    """What the mixins ask for: sizes, a config and inputs."""

    is_training = True
    batch_size, seq_length = 13, 7

    def __init__(self, case: Peer) -> None:
        self.case = case
        config = case.config()
        self.hidden_size, self.num_hidden_layers = config.hidden_size, config.num_hidden_layers
        self.num_attention_heads, self.vocab_size = config.num_attention_heads, config.vocab_size

    def get_config(self) -> Any:
        """A config of its own for every test."""
        return self.case.config()

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Tensor]]:
        """Random tokens, of which row i has its last i + 1 unmasked: padded on the left, as generation needs it."""
        ids = torch.randint(0, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids).tril().flip(1)}


class Peer(ModelTesterMixin, GenerationTesterMixin):
    """Both mixins on the plain class of a family."""

    row: ClassVar[str] = "llama"

    @classmethod
    def config(cls) -> Any:
        return plain_config(cls.row)

    @property
    def all_model_classes(self) -> tuple[type, ...]:
        return (MODEL_FOR_CAUSAL_LM_MAPPING[type(self.config())],)

    def setUp(self) -> None:
        self.model_tester = Tester(self)


class Hybrid(Peer):
    """Both mixins on a hybrid; transformers' testers of Bamba, Jamba and Zamba2 replace the same three methods."""

    kind: ClassVar[str]
    layers: ClassVar[tuple[int, ...]]

    @classmethod
    def config(cls) -> Any:
        return hybrid_config(cls.row, cls.kind, cls.layers)

    @property
    def all_model_classes(self) -> tuple[type, ...]:
        return (hybrid_class(self.config()),)

    def test_attention_outputs(self) -> None:
        """The suite counts one attention for each layer; here only kept layers have one."""
        self.model_tester.num_hidden_layers -= len(self.layers)
        super().test_attention_outputs()

    def _check_past_key_values_for_generate(
        self, batch_size: int, past_key_values: Any, seq_length: int, config: Any
    ) -> None:
        """The suite asks every layer for keys; a converted one has a convolution's inputs and a state."""
        text, cache, sizes = config.get_text_config(), past_key_values, self.config().layers()
        width = getattr(text, "head_dim", text.hidden_size // text.num_attention_heads)
        keys = (batch_size, text.num_key_value_heads, seq_length, width)
        assert len(cache) == text.num_hidden_layers
        for index, layer in enumerate(cache.layers):
            if index in self.layers:
                shape = sizes[index][1]
                assert layer.conv_states[0].shape == (batch_size, shape.conv_kernel - 1, shape.conv_channels)
                assert layer.recurrent_states[0].shape == (batch_size, shape.heads, shape.head_dim, shape.state)
            else:
                assert layer.keys.shape == layer.values.shape == keys

    def _check_caches_are_equal(self, first: Any, second: Any) -> None:
        assert len(first) == len(second)
        for index, (own, other) in enumerate(zip(first.layers, second.layers, strict=True)):
            if index in self.layers:
                assert own.seen == other.seen
                pairs = (
                    (own.conv_states[0], other.conv_states[0]),
                    (own.recurrent_states[0], other.recurrent_states[0]),
                )
            else:
                pairs = ((own.keys, other.keys), (own.values, other.values))
            for tensors in pairs:
                torch.testing.assert_close(*tensors)


class Recurrent(Hybrid):
    """Both mixins on a hybrid without attention."""

    layers = (0, 1)
    # as transformers' tester of Mamba-2 says it
    has_attentions = False


class TestPlainLlama(Peer, unittest.TestCase):
    """A control: what fails here is the suite's or the machine's."""


class TestPlainGemma3(Peer, unittest.TestCase):
    """A control."""

    row = "gemma3"


class TestLlamaMamba2(Hybrid, unittest.TestCase):
    kind, layers = "mamba2", (1,)


class TestLlamaMamba2All(Recurrent, unittest.TestCase):
    kind = "mamba2"

    @unittest.expectedFailure
    def test_tp_plan_matches_params(self) -> None:
        """The teacher's plan names q, k, v and o, of which no layer is left; mixers are not split."""
        super().test_tp_plan_matches_params()


class TestLlamaDiscrete(Hybrid, unittest.TestCase):
    kind, layers = "discrete_mamba2", (1,)


class TestGemma3Mamba2(Hybrid, unittest.TestCase):
    row, kind, layers = "gemma3", "mamba2", (1,)


class TestQwen2Mamba2(Hybrid, unittest.TestCase):
    row, kind, layers = "qwen2", "mamba2", (1,)

    @unittest.expectedFailure
    def test_correct_missing_keys(self) -> None:
        """The base model saved alone has the teacher's config, which is refused; tied models are not asked."""
        super().test_correct_missing_keys()
