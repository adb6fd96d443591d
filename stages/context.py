"""What every stage is handed, and how a stage is asked to stop."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ssmorph.convert.families import FamilySpec

from .data import TokenBatch

if TYPE_CHECKING:
    from .config import RunConfig
    from .data import PackedData
    from .rundir import RunDir


class Interrupted(Exception):
    """A signal asked the run to stop; everything up to the last finished step is saved."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class StopFlag:
    """Set by SIGTERM or Ctrl-C; looked at between steps, so that a step is never torn."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def check(self) -> None:
        """Raises Interrupted if a signal came."""
        if self.signum is not None:
            raise Interrupted(self.signum)


@contextlib.contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """While open, SIGTERM and SIGINT set the flag; a second one of the same kind acts at once."""
    flag = StopFlag()
    previous: dict[int, Any] = {}

    def handle(signum: int, _frame: FrameType | None) -> None:
        flag.signum = signum
        signal.signal(signum, previous[signum])

    for signum in (int(signal.SIGTERM), int(signal.SIGINT)):
        previous[signum] = signal.getsignal(signum)
        with contextlib.suppress(ValueError):  # not the main thread: there the host program owns its signals
            signal.signal(signum, handle)
    try:
        yield flag
    finally:
        for signum, handler in previous.items():
            with contextlib.suppress(ValueError):
                signal.signal(signum, handler)


@dataclass
class Context:
    """One run in one process: its recipe, folder, models and data."""

    config: RunConfig
    run: RunDir
    teacher: Any
    student: Any
    spec: FamilySpec
    data: PackedData
    stop: StopFlag
    say: Callable[[str], None]
    tracker: Any
    tokenizer: Any = None

    def device(self) -> torch.device:
        """Where both models live."""
        return torch.device(self.config.device)

    def batch(self, stage: int, step: int, size: int) -> TokenBatch:
        """The tokens of one step and which of them carry loss, [B, L]: a pure function of (seed, stage, step)."""
        seed = self.config.seed * 1000 + stage
        batch = self.data.batch(seed, step, 0, 1, size, self.config.data.window)
        return TokenBatch(batch.tokens_BL.to(self.device()), batch.loss_mask_BL.to(self.device()), step)


def trained_parameters(student: Any, rest: bool) -> dict[str, nn.Parameter]:
    """The mixers' parameters by name, and all others too where `rest` is asked for."""
    prefixes = tuple(f"{name}." for name, module in student.named_modules() if module in student.mixers().values())
    return {name: p for name, p in student.named_parameters() if rest or name.startswith(prefixes)}
