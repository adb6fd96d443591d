"""The part of a recipe that says what the student is, and how its layers are chosen. Standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from ssmorph.convert.plan import SCORED, UNSCORED, retrieval_count, strategy_of

from ..errors import require

HEADS = "mamba2_heads"
# have a window of the attention; these and HEADS may keep heads
WINDOWED = ("windowed_mamba2", "window")


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """Which layers become which mixer.

    `layers`: a list of indices, `all`, or NAME-K, K being the number of layers that are converted. NAME is uniform,
    first, last or middle, or one that scores them first: loo, kl, retrieval, smart or gates (docs/method.md). A scoring
    NAME without K converts as many as `placement.cache_mib` asks for. `heads`, of mamba2_heads and mixers with windows:
    which query heads of converted layers stay attention, a list of 'LAYER.HEAD', or `retrieval-N`: the N that matter
    most to fetching a value by its key. Around a window all heads that share a key/value head with them stay too.
    """

    mixer: Literal["mamba2", "discrete_mamba2", "windowed_mamba2", "window", "mamba2_heads"] = "mamba2"
    layers: str | tuple[int, ...] = "uniform-15"
    conv_kernel: int = 4
    # of mixers with a window: tokens it holds, its sinks included; prototypes of the state behind it
    window: int = 64
    sinks: int = 4
    state: int = 64
    heads: str | tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check_heads()
        require(2 <= self.conv_kernel <= 4, "student.conv_kernel", "must be 2, 3 or 4", self.conv_kernel, "Use 4.")
        require(self.sinks >= 0, "student.sinks", "must not be negative", self.sinks, "Use 4.")
        require(self.window > self.sinks, "student.window", "must hold more than its sinks", self.window, "Use 64.")
        require(self.state >= 1, "student.state", "must be positive", self.state,
                 "Use 64, or mixer: window for none.")  # fmt: skip
        if isinstance(self.layers, str):
            require(
                self.layers == "all" or strategy_of(self.layers) is not None,
                "student.layers",
                f"must be a list of layers, 'all' or NAME-K with NAME one of {', '.join(UNSCORED + SCORED)}",
                repr(self.layers),
                "Use 'uniform-15'.",
            )
            strategy = strategy_of(self.layers)
            some = strategy is None or strategy.layers != 0
            require(some, "student.layers", "needs a layer to convert", self.layers, "Use 'uniform-15'.")
        else:
            require(len(self.layers) > 0, "student.layers", "needs a layer to convert", [], "Use 'uniform-15'.")
            unique = len(set(self.layers)) == len(self.layers) and min(self.layers, default=0) >= 0
            require(
                unique,
                "student.layers",
                "layers are distinct and not negative",
                list(self.layers),
                "List each layer once.",
            )

    def _check_heads(self) -> None:
        if isinstance(self.heads, str):
            ok = retrieval_count(self.heads) is not None
        else:
            ok = all(re.fullmatch(r"\d+\.\d+", head) for head in self.heads) and len({*self.heads}) == len(self.heads)
        got = repr(self.heads) if isinstance(self.heads, str) else list(self.heads)
        require(ok, "student.heads", "must be a list of distinct 'LAYER.HEAD', or 'retrieval-N'", got,
                 "Use 'retrieval-20'.")  # fmt: skip
        require(not self.heads or self.mixer in (HEADS, *WINDOWED), "student.heads",
                 f"needs a mixer of {', '.join((HEADS, *WINDOWED))}", self.mixer,
                 "Use one of them, or leave heads out.")  # fmt: skip
        require(bool(self.heads) or self.mixer != HEADS, "student.heads", f"{HEADS} needs heads to keep", got,
                 "Use 'retrieval-20', or mixer: mamba2.")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PlacementConfig:
    """What scoring layers may read and train, where `student.layers` asks for scores; else without effect.

    `calibration_tokens` make the mixers (and those of the controls), `score_tokens` measure KL, `train_tokens` train
    for `kl` (0: not at all) and `gates`; `lr` is of `kl`, `probes` are of `retrieval`, for `student.heads` too.
    `cache_mib`: MiB of cache in float32 at `context` tokens that the hybrid has to fit into, where `student.layers` has
    no K.
    """

    calibration_tokens: int = 8_192
    score_tokens: int = 4_096
    train_tokens: int = 8_192
    lr: float = 4e-4
    probes: int = 16
    cache_mib: float | None = None
    context: int = 4_096

    def __post_init__(self) -> None:
        for name in ("calibration_tokens", "score_tokens", "lr", "probes", "context"):
            value = getattr(self, name)
            require(value > 0, f"placement.{name}", "must be positive", value, "Use the default.")
        require(self.train_tokens >= 0, "placement.train_tokens", "must not be negative", self.train_tokens, "Use 0.")
        require(self.cache_mib is None or self.cache_mib > 0, "placement.cache_mib", "must be positive",
                 self.cache_mib, "Leave it out.")  # fmt: skip
