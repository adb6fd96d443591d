"""Which heads stay attention in converted layers: those the recipe lists, or those that matter most to retrieval."""

from __future__ import annotations

from typing import Any

from ssmorph.convert.families import AttentionShape
from ssmorph.convert.plan import Head, foremost_heads, listed_heads, retrieval_count, spread_heads

from .config import RunConfig
from .context import Context
from .head_probe import head_importance

FILE = "placement/heads.json"


def kept_heads(ctx: Context, layers: tuple[int, ...]) -> tuple[Head, ...]:
    """The heads that stay attention in converted `layers`; none for a mixer that keeps none.

    The probe is asked once; the run directory keeps what it said, so that a resumed run keeps the same heads.

    Raises:
        ValueError: a head that is not there, or more heads than there are.
    """
    config, attention = ctx.config, ctx.spec.shape(ctx.teacher.config)
    before = heads_before_probe(config, layers, attention)
    count = retrieval_count(config.student.heads)
    return before if count is None else foremost_heads(_importance(ctx), layers, count)


def heads_before_probe(config: RunConfig, layers: tuple[int, ...], attention: AttentionShape) -> tuple[Head, ...]:
    """What can be told of the kept heads without weights: those listed, or as many as `retrieval-N`, evenly spread.

    Raises:
        ValueError: as `kept_heads`.
    """
    heads = config.student.heads
    if isinstance(heads, tuple):
        return listed_heads(heads, layers, attention.heads)
    count = retrieval_count(heads)
    assert count is not None, "the recipe was checked"
    return spread_heads(count, layers, attention)


def _importance(ctx: Context) -> list[list[float]]:
    """How much each head matters to retrieval, [layers, heads]."""
    teacher, seed, probes = ctx.config.teacher, ctx.config.seed, ctx.config.placement.probes
    stamp: dict[str, Any] = {"source": teacher.source, "revision": teacher.revision, "seed": seed, "probes": probes}
    found = ctx.run.read_json(FILE)
    if found is None or found["stamp"] != stamp:
        ctx.say("heads: one backward pass over a key-value probe")
        ctx.run.stage_dir("placement")
        measured = head_importance(ctx.teacher, ctx.spec, ctx.tokenizer, seed=seed, probes=probes)
        found = {"stamp": stamp, "importance": measured.tolist()}
        ctx.run.write_json(FILE, found)
    importance: list[list[float]] = found["importance"]
    return importance
