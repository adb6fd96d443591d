"""How much the evaluator measures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Suite:
    """How much is measured. Tokens are per held-out set; `lengths` are window lengths.

    `work_tokens` are for hybrids with a part taken away, `added` for how many sizes of them with few layers converted,
    `aligned_tokens` for alignment and matrices.
    """

    tokens: int
    domain_tokens: int
    lengths: tuple[int, ...]
    retrieval_distances: tuple[int, ...]
    retrieval_probes: int
    decode_contexts: tuple[int, ...]
    work_tokens: int
    added: int
    aligned_tokens: int
    prompts: int
    new_tokens: int
    task_lengths: tuple[int, ...] = ()
    task_depths: tuple[float, ...] = ()
    task_probes: int = 0
    domain_controls: bool = False


def suite_named(name: str, tokens: int, window: int) -> Suite:
    """`short` fits into the demo; `full` adds long windows, retrieval by length and depth, and 16k decoding."""
    if name == "short":
        return Suite(
            tokens=tokens,
            domain_tokens=tokens // 2,
            lengths=(window,),
            retrieval_distances=(128,),
            retrieval_probes=16,
            decode_contexts=(512, 4096),
            work_tokens=tokens // 6,
            added=3,
            aligned_tokens=window,
            prompts=4,
            new_tokens=48,
        )
    return Suite(
        tokens=4 * tokens,
        domain_tokens=tokens,
        lengths=tuple(dict.fromkeys((window, 2048))),
        retrieval_distances=(64, 256, 512, 1024),
        retrieval_probes=32,
        decode_contexts=(512, 4096, 16384),
        work_tokens=tokens // 2,
        added=6,
        aligned_tokens=4 * window,
        prompts=16,
        new_tokens=128,
        task_lengths=(256, 1024),
        task_depths=(0.1, 0.5, 0.9),
        task_probes=16,
        domain_controls=True,
    )
