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

# the suite wants two layers; weights this large make states and caches move the logits
CHANGES = {"num_hidden_layers": 2, "initializer_range": 0.1}


def plain_config(row: str) -> Any:
    """A teacher's config."""
    model_type, values = ROWS[row]
    return AutoConfig.for_model(model_type, **{**values, **CHANGES})


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
        """Random tokens, of which row i has its first i + 1 unmasked, as transformers' testers do it."""
        ids = torch.randint(0, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids).tril()}


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
    """Both mixins on a hybrid."""

    kind: ClassVar[str]
    layers: ClassVar[tuple[int, ...]]

    @classmethod
    def config(cls) -> Any:
        return hybrid_config(cls.row, cls.kind, cls.layers)

    @property
    def all_model_classes(self) -> tuple[type, ...]:
        return (hybrid_class(self.config()),)


class TestPlainLlama(Peer, unittest.TestCase):
    """The control: what fails here is the suite's or the machine's."""


class TestLlamaMamba2(Hybrid, unittest.TestCase):
    kind, layers = "mamba2", (1,)


class TestLlamaMamba2All(Hybrid, unittest.TestCase):
    kind, layers = "mamba2", (0, 1)


class TestLlamaDiscrete(Hybrid, unittest.TestCase):
    kind, layers = "discrete_mamba2", (1,)


class TestGemma3Mamba2(Hybrid, unittest.TestCase):
    row, kind, layers = "gemma3", "mamba2", (1,)
