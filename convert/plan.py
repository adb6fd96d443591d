"""Which layers become which mixer, and what that costs in bytes of cache. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..errors import fail

if TYPE_CHECKING:
    from .families import AttentionShape
    from .mixers import MixerShape


# strategies NAME-K that need the number of layers alone, and those that need scores (stages/placement.py)
UNSCORED = ("uniform", "first", "last", "middle")
SCORED = ("loo", "kl", "retrieval", "smart", "gates")


class Strategy(NamedTuple):
    """`NAME-K`, or NAME alone where a budget of bytes decides how many layers are converted."""

    name: str
    layers: int | None

    @property
    def scored(self) -> bool:
        """Whether it needs a score of every layer."""
        return self.name in SCORED


def strategy_of(layers: str | tuple[int, ...]) -> Strategy | None:
    """The strategy that a recipe's `student.layers` names; None for a list, `all`, and what is none."""
    if not isinstance(layers, str):
        return None
    name, dash, count = layers.partition("-")
    if name in UNSCORED + SCORED and count.isdecimal():
        return Strategy(name, int(count))
    return Strategy(name, None) if name in SCORED and not dash else None


def resolve_layers(layers: str | tuple[int, ...], total: int) -> tuple[int, ...]:
    """The layer indices that are CONVERTED, as a recipe's `student.layers` means them for a model of `total` layers.

    Of NAME-K, K is the number of converted layers: `first-K` and `last-K` convert the first and the last K, `middle-K`
    K in the middle; `uniform-K` spreads them evenly and keeps the first layer whenever K < total. For a strategy that
    needs scores, this gives as many layers as it converts, evenly spread (all, where a budget decides).

    Raises:
        ValueError: an index or a count out of range.
    """
    if isinstance(layers, str):
        strategy = strategy_of(layers)
        count = total if strategy is None or strategy.layers is None else strategy.layers
        if count > total:
            raise fail(
                "student.layers",
                f"a {total}-layer model has at most {total} layers to convert",
                layers,
                f"Use 'uniform-{total // 2}'.",
            )
        starts = {"first": 0, "middle": (total - count) // 2, "last": total - count}
        if strategy is not None and strategy.name in starts:
            return tuple(range(starts[strategy.name], starts[strategy.name] + count))
        return tuple(sorted(total - 1 - (index * total) // count for index in range(count)))
    for layer in layers:
        if not 0 <= layer < total:
            raise fail("student.layers", f"a layer must be in 0..{total - 1}", layer, f"The model has {total} layers.")
    return tuple(sorted(layers))


def lowest(scores: Sequence[float], count: int) -> tuple[int, ...]:
    """The `count` layers of lowest score, which are converted; of equal ones the later."""
    return tuple(sorted(sorted(range(len(scores)), key=lambda i: (scores[i], -i))[:count]))


def spread_lowest(scores: Sequence[float], count: int) -> tuple[int, ...]:
    """The `count` layers to convert so that those kept have a high total score and are spread over the depth.

    A run of converted layers is longer than needed where it exceeds ceil(K / (kept + 1)), which even spreading reaches;
    each layer too many costs the mean score of all layers. Exact, by dynamic programming over the last kept layer.
    """
    total, kept = len(scores), len(scores) - count
    run, price = -(-count // (kept + 1)), sum(map(abs, scores)) / max(1, total)
    # worth of the best choice of layers that ends with layer i, and that choice; -1 stands before the first
    best: dict[int, tuple[float, tuple[int, ...]]] = {-1: (0.0, ())}

    def joined(last: int, i: int) -> tuple[float, tuple[int, ...]]:
        worth, chosen = best[last]
        return worth - price * max(0, i - last - 1 - run) + (scores[i] if i < total else 0.0), (*chosen, i)

    for _ in range(kept):
        best = {i: max(joined(j, i) for j in best if j < i) for i in range(total) if any(j < i for j in best)}
    chosen = max(joined(j, total) for j in best)[1][:-1]
    return tuple(i for i in range(total) if i not in chosen)


def cheapest_fitting(
    scores: Sequence[float], held: Sequence[int], fixed: int, budget: int, where: str = "placement.cache_mib"
) -> tuple[int, ...]:
    """The layers to convert so that the cache takes at most `budget` bytes: those of lowest score per byte saved first.

    Args:
        held: bytes that each layer's attention holds, which a sliding window bounds.
        fixed: bytes that a mixer holds in its place.

    Raises:
        ValueError: a budget that no choice of layers fits.
    """
    size, converted = sum(held), []
    saving = [i for i, own in enumerate(held) if own > fixed]
    for i in sorted(saving, key=lambda i: (scores[i] / (held[i] - fixed), -i)):
        if size <= budget:
            break
        converted.append(i)
        size += fixed - held[i]
    if size > budget:
        do = "Raise it, or shorten placement.context."
        raise fail(where, f"the smallest cache takes {size / 2**20:.3g} MiB", f"{budget / 2**20:.3g}", do)
    return tuple(sorted(converted))


def attention_bytes(
    attention: AttentionShape, windows: Sequence[int | None], context: int, itemsize: int
) -> tuple[int, ...]:
    """Bytes of each layer's keys and values after `context` tokens; a sliding window holds no more than itself."""
    per_token = kv_bytes_per_token(attention, itemsize)
    return tuple(per_token * min(context, window or context) for window in windows)


# (layer, query head)
Head = tuple[int, int]


def retrieval_count(heads: str | tuple[str, ...]) -> int | None:
    """N of a recipe's `student.heads: retrieval-N`; None for a list, and for what is neither."""
    name, dash, count = heads.partition("-") if isinstance(heads, str) else ("", "", "")
    return int(count) if dash and name == "retrieval" and count.isdecimal() else None


def listed_heads(heads: Sequence[str], layers: Sequence[int], each: int) -> tuple[Head, ...]:
    """The heads of a list of 'LAYER.HEAD', in order.

    Args:
        layers: those that are converted.
        each: query heads of a layer.

    Raises:
        ValueError: a head of a layer that keeps its attention anyway, or that is not there.
    """
    pairs = []
    for name in heads:
        layer, head = map(int, name.split("."))
        if layer not in layers:
            rule = f"a kept head is in a converted layer, of {', '.join(map(str, layers)) or 'which there are none'}"
            raise fail("student.heads", rule, repr(name), "Leave it out, or convert its layer.")
        if head >= each:
            raise fail("student.heads", f"a head must be in 0..{each - 1}", repr(name), f"A layer has {each} heads.")
        pairs.append((layer, head))
    return tuple(sorted(pairs))


def foremost_heads(importance: Sequence[Sequence[float]], layers: Sequence[int], count: int) -> tuple[Head, ...]:
    """The `count` heads of highest importance among those of `layers`; of equal ones the earlier."""
    pairs = [(layer, head) for layer in sorted(layers) for head in range(len(importance[layer]))]
    return tuple(sorted(sorted(pairs, key=lambda pair: -importance[pair[0]][pair[1]])[:count]))


def sharing_heads(heads: Sequence[Head], attention: AttentionShape) -> tuple[Head, ...]:
    """`heads` and all others that read the same key/value heads."""
    repeat = attention.heads // attention.kv_heads
    groups = sorted({(layer, head // repeat) for layer, head in heads})
    return tuple((layer, group * repeat + i) for layer, group in groups for i in range(repeat))


def spread_heads(count: int, layers: Sequence[int], attention: AttentionShape) -> tuple[Head, ...]:
    """`count` heads spread evenly over `layers`, and in a layer over its key/value heads.

    Raises:
        ValueError: there are fewer.
    """
    if count > len(layers) * attention.heads:
        rule = f"{len(layers)} converted layers have {len(layers) * attention.heads} heads"
        raise fail("student.heads", rule, f"retrieval-{count}", "Take fewer.")
    repeat = attention.heads // attention.kv_heads
    order = sorted(range(attention.heads), key=lambda head: (head % repeat, head))
    return tuple(sorted((layers[i % len(layers)], order[i // len(layers)]) for i in range(count)))


def kv_bytes_per_token(attention: AttentionShape, itemsize: int) -> int:
    """Bytes one token adds to the cache of one attention layer."""
    return 2 * attention.kv_heads * attention.head_dim * itemsize


def kept_bytes_per_token(shape: MixerShape, itemsize: int) -> int:
    """Bytes one token adds to the cache of a mixer: keys and values of the heads that kept heads read."""
    return 2 * len(shape.kept_groups()) * shape.head_dim * itemsize


def cache_bytes(shape: MixerShape, itemsize: int) -> int:
    """Bytes of one mixer's cache: the state in float32, the convolution's last inputs in the model's dtype.

    With a window: its keys and values, and the state of values and mass for each key/value head. With kept heads: that
    of the Mamba-2 heads beside them; their keys and values grow with the text.
    """
    if shape.kept:
        return cache_bytes(shape.beside(), itemsize)
    if shape.window:
        held = 2 * shape.window * shape.groups * shape.head_dim * itemsize
        return held + shape.groups * (shape.head_dim + 1) * shape.state * 4
    return shape.heads * shape.head_dim * shape.state * 4 + (shape.conv_kernel - 1) * shape.conv_channels * itemsize
