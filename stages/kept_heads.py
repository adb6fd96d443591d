"""Which heads stay attention in converted layers: those the recipe lists, or those that matter most to retrieval."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmorph.convert.families import AttentionShape
from ssmorph.convert.mixers import has_window
from ssmorph.convert.plan import Head, foremost_heads, listed_heads, retrieval_count, sharing_heads, spread_heads
from ssmorph.convert.surgery import require_attention_function

from .config import RunConfig
from .context import Context
from .head_probe import far_importance, head_importance

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
    return before if count is None else _whole(foremost_heads(_importance(ctx), layers, count), config, attention)


def heads_before_probe(config: RunConfig, layers: tuple[int, ...], attention: AttentionShape) -> tuple[Head, ...]:
    """What can be told of the kept heads without weights: those listed, or as many as `retrieval-N`, evenly spread.

    Raises:
        ValueError: as `kept_heads`.
    """
    heads = config.student.heads
    if isinstance(heads, tuple):
        return _whole(listed_heads(heads, layers, attention.heads), config, attention)
    count = retrieval_count(heads)
    assert count is not None, "the recipe was checked"
    return _whole(spread_heads(count, layers, attention), config, attention)


def _whole(heads: tuple[Head, ...], config: RunConfig, attention: AttentionShape) -> tuple[Head, ...]:
    """Around a window, with the other heads that read the same keys and values."""
    return sharing_heads(heads, attention) if has_window(config.student.mixer) else heads


def heads_importance(ctx: Context) -> Tensor:
    """How much each head matters to fetching a value by its key, [layers, heads]: behind a window if there is one."""
    student, seed, probes = ctx.config.student, ctx.config.seed, ctx.config.placement.probes
    require_attention_function(ctx.spec, ctx.teacher.config, student.mixer)
    if has_window(student.mixer):
        size = student.window, student.sinks
        return far_importance(ctx.teacher, ctx.spec, ctx.tokenizer, *size, seed=seed, probes=probes)
    return head_importance(ctx.teacher, ctx.spec, ctx.tokenizer, seed=seed, probes=probes)


def _importance(ctx: Context) -> list[list[float]]:
    """The same, asked once for a run."""
    teacher, student = ctx.config.teacher, ctx.config.student
    stamp: dict[str, Any] = {"source": teacher.source, "revision": teacher.revision, "seed": ctx.config.seed,
                             "probes": ctx.config.placement.probes}  # fmt: skip
    if has_window(student.mixer):
        stamp |= {"window": student.window, "sinks": student.sinks}
    found = ctx.run.read_json(FILE)
    if found is None or found["stamp"] != stamp:
        ctx.say("heads: a key-value probe, and its gradient")
        ctx.run.stage_dir("placement")
        found = {"stamp": stamp, "importance": heads_importance(ctx).tolist()}
        ctx.run.write_json(FILE, found)
    importance: list[list[float]] = found["importance"]
    return importance
