"""One document to tokens: plain text, or a conversation through the tokenizer's template with loss on the answers.

And what stands before a text: some models saw a start token there in all of their training, and are lost without it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..errors import fail
from .user_text import Document


class Encoded(NamedTuple):
    """Tokens of a document and which of them carry loss."""

    tokens: list[int]
    loss: list[bool]


def start_tokens(tokenizer: Any) -> list[int]:
    """The token that this tokenizer puts before a text, if it does."""
    start = tokenizer.bos_token_id
    return [start] if start is not None and tokenizer("a").input_ids[:1] == [start] else []


def encode(document: Document, tokenizer: Any, loss_on: str) -> Encoded:
    """Tokenises a document.

    Raises:
        ValueError: a conversation for a tokenizer without a chat template, or one whose template rewrites the past.
    """
    if document.messages is None:
        tokens = tokenizer(document.text, add_special_tokens=False, verbose=False).input_ids
        return Encoded(tokens, [True] * len(tokens))
    if not tokenizer.chat_template:
        raise fail(
            "data.sources", "chat data needs a tokenizer with a chat template", "none", "Use a chat model's tokenizer."
        )
    messages = list(document.messages)
    whole = _render(tokenizer, messages, False)
    if loss_on == "all":
        tokens = tokenizer(whole, add_special_tokens=False).input_ids
        return Encoded(tokens, [True] * len(tokens))
    return _with_answers(tokenizer, messages, whole)


def _with_answers(tokenizer: Any, messages: list[dict[str, str]], whole: str) -> Encoded:
    """Loss on what each assistant message adds to the conversation up to it."""
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = _render(tokenizer, messages[:i], True), _render(tokenizer, messages[: i + 1], False)
            if not (whole.startswith(before) and whole.startswith(after)):
                raise fail(
                    "data.loss_on",
                    "'answers' needs a template that only appends",
                    "one that rewrites the past",
                    "Use 'all'.",
                )
            spans.append((len(before), len(after)))
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    loss = [any(start >= a and end <= b for a, b in spans) for start, end in encoded.offset_mapping]
    return Encoded(encoded.input_ids, loss)


def _render(tokenizer: Any, messages: list[dict[str, str]], prompt: bool) -> str:
    if not messages:
        return ""
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
