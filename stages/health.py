"""What can be wrong with a hybrid before any text is read: numbers that are not numbers, and another tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# words, digits, spaces, code and other scripts: text on which different tokenizers differ
SAMPLE = "The café's 3,141 visitors didn't pay €59.\n\tfor i in range(10):  print(i ** 2)\n日本語 и русский; done!"


def not_finite(model: Any) -> list[str]:
    """Names of parameters that hold NaN or infinity."""
    return [name for name, p in model.named_parameters() if not bool(p.isfinite().all())]


def tokenizer_differences(own: Any, taught: Any) -> list[str]:
    """In what a tokenizer is not the teacher's: vocabulary, the sample's tokens, special tokens, chat template."""

    def tokens(tokenizer: Any) -> list[int]:
        return tokenizer(SAMPLE, add_special_tokens=False).input_ids

    return [
        name
        for name, same in (
            ("vocabulary", own.get_vocab() == taught.get_vocab()),
            ("tokens of a sample text", tokens(own) == tokens(taught)),
            ("end-of-text token", own.eos_token_id == taught.eos_token_id),
            ("start token", own.bos_token_id == taught.bos_token_id),
            ("chat template", own.chat_template == taught.chat_template),
        )
        if not same
    ]


def inspect_final(folder: Path, teacher_tokenizer: Any) -> dict[str, Any]:
    """The report's entry on a folder that from_pretrained loads."""
    from transformers import AutoTokenizer

    from ssmorph.convert.modeling import register

    # unregistered, the folder's own code would be asked for
    register()
    own = AutoTokenizer.from_pretrained(folder)
    return {"tokenizer_differences": tokenizer_differences(own, teacher_tokenizer)}
