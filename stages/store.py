"""Stores a recipe's teacher logits: the other half of a logits stage with `offline`. The same call again goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..errors import fail
from .config import LogitsStage, RunConfig
from .context import stop_signals
from .machine import as_before, check_device, choose_products, choose_threads, set_products
from .offline import write_stage
from .pipeline import prepare
from .rundir import RunDir
from .targets import check_targets


def store_logits(config: RunConfig, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Writes the logits of every stage with `offline`; the run's folder gets the packed text that it will train on.

    Returns:
        Of each stage its folder, steps, tokens, bytes, and the mean probability that the kept tokens have.

    Raises:
        ValueError: no such stage, a teacher that does not fit, a folder written for another recipe, a full disk.
        Interrupted: SIGTERM or Ctrl-C; the same command goes on after the last whole shard.
    """
    chosen = {i: s for i, s in enumerate(config.stages) if isinstance(s, LogitsStage) and s.offline is not None}
    if not chosen:
        do = "Add offline: FOLDER to a logits stage."
        raise fail("stages", "one with offline is needed to store logits for", config.stage_names(), do)
    check_targets(config, list(chosen))
    check_device(config.device)
    with RunDir(config.run_dir) as run, stop_signals() as stop, as_before():
        torch.set_num_threads(config.threads or choose_threads())
        if config.device == "cpu":
            set_products(choose_products())
        ctx = prepare(replace(config, tracker="none"), run, stop, say)
        return [write_stage(ctx, index, stage) for index, stage in chosen.items()]
