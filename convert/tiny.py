"""A small random Llama with a byte tokenizer: the teacher of smoke, kill and resume tests, made the same everywhere.

Drawn with larger weights than usual, because on freshly initialised models the mixers hardly move the logits, and every
test of caches and states would pass whatever they do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

ALIAS = "tiny-random-llama"


def tiny_config(**changes: Any) -> Any:
    """Its LlamaConfig; `changes` replace single values."""
    from transformers import LlamaConfig

    values = {
        "vocab_size": 260, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "tie_word_embeddings": True,
        "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
    }  # fmt: skip
    return LlamaConfig(**{**values, **changes})


@torch.no_grad()
def strengthen(model: Any, seed: int = 0, scale: float = 1.0) -> Any:
    """Redraws every matrix at the size at which each layer changes its input by about as much as it holds."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.dim() > 1:
            size = 1.0 if "embed" in name else scale * parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
        elif name.endswith("bias"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def byte_tokenizer() -> Any:
    """One token per byte, then <s>, </s>, <pad>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*letters, "<s>", "</s>", "<pad>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def write_tiny(folder: Path) -> None:
    """Saves model and tokenizer."""
    from transformers import LlamaForCausalLM

    strengthen(LlamaForCausalLM(tiny_config())).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
