"""Greedy continuations of the same prompts, side by side, with statistics that show a text that runs in circles.

N prompts, L length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

REPEAT = 4


@torch.no_grad()
def continuations(
    teacher: Any, models: dict[str, Any], tokenizer: Any, prompts_NL: Tensor, new_tokens: int
) -> dict[str, Any]:
    """What each model writes after the prompts, and its statistics under `models`."""
    prompts_NL = prompts_NL.to(teacher.device)
    rows: list[dict[str, Any]] = [{"prompt": tokenizer.decode(p)} for p in prompts_NL]
    statistics = {}
    for name, model in models.items():
        eos = _ends(model)
        written = [_until_end(r[prompts_NL.shape[1] :].tolist(), eos) for r in _greedy(model, prompts_NL, new_tokens)]
        for row, (tokens, _) in zip(rows, written, strict=True):
            row[name] = tokenizer.decode(tokens)
        texts = [tokens for tokens, _ in written]
        statistics[name] = {
            **text_statistics(texts),
            "ended": sum(ended for _, ended in written) / len(written),
            "teacher_nll": _teacher_nll(teacher, prompts_NL, texts),
        }
    return {"new_tokens": new_tokens, "models": statistics, "texts": rows}


def text_statistics(texts: list[list[int]]) -> dict[str, float]:
    """Means over texts of the length, of distinct-1 and distinct-2, and of the share of 4-grams seen before."""
    count = max(1, len(texts))
    return {
        "length": sum(len(t) for t in texts) / count,
        "distinct_1": sum(_distinct(t, 1) for t in texts) / count,
        "distinct_2": sum(_distinct(t, 2) for t in texts) / count,
        "repeated_4": sum(1 - _distinct(t, REPEAT) for t in texts) / count,
    }


def _distinct(tokens: list[int], n: int) -> float:
    """Different n-grams as a share of all; 1 for a text too short to hold one."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def _greedy(model: Any, prompts_NL: Tensor, new_tokens: int) -> Tensor:
    ends = _ends(model)
    options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": min(ends) if ends else 0}
    return model.generate(prompts_NL, attention_mask=torch.ones_like(prompts_NL), **options)


def _ends(model: Any) -> set[int]:
    eos = model.generation_config.eos_token_id
    return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)


def _until_end(tokens: list[int], ends: set[int]) -> tuple[list[int], bool]:
    for i, token in enumerate(tokens):
        if token in ends:
            return tokens[:i], True
    return tokens, False


def _teacher_nll(teacher: Any, prompts_NL: Tensor, texts: list[list[int]]) -> float | None:
    """What the teacher makes of the texts: mean of -log p over their tokens; None where nothing was written."""
    total, count = 0.0, 0
    for prompt_L, tokens in zip(prompts_NL, texts, strict=True):
        if tokens:
            own = torch.tensor(tokens, device=prompt_L.device)
            logits = teacher(torch.cat([prompt_L, own])[None], use_cache=False, logits_to_keep=len(tokens) + 1).logits
            log_TV = logits[0, :-1].float().log_softmax(-1)
            total -= float(log_TV.gather(-1, own[:, None]).sum())
            count += len(tokens)
    return total / count if count else None
