"""What the approximations and drops of a plan cost, on the teacher's weights and held-out text of the recipe."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from ssmorph.convert.families import family_of
from ssmorph.convert.measure_treatment import MEASURED, Cost, measure
from ssmorph.convert.teachers import load_teacher
from ssmorph.convert.treatment import BEHIND

from ..errors import UserError, fail
from .config import RunConfig
from .data import open_or_pack

# held-out tokens, in whole windows of the recipe
TOKENS = 2048
# what no change of one thing alone can show, and who tells instead
ELSEWHERE = {
    "softmax": "calibration reports its error",
    "attention scale": "the mixer's norm cancels it",
    "attention": "nothing of it is copied",
    BEHIND: "it is for evaluation to tell",
}


def measured(config: RunConfig, plan: dict[str, Any]) -> dict[str, Any]:
    """The plan with `measured` in each row of its treatment that is not exact, and `measured_on`, the text.

    `measured` has `median`, `worst` and `worst_layer` of ||o' - o||^2 / ||o||^2 over the converted layers that have the
    feature, or `not_measured`, the reason; teacher or text that cannot be loaded is one. Rows of one name share a cost.
    """
    rows, text = plan["treatment"], None
    lost = [row["feature"] for row in rows if row["treatment"] != "exact"]
    costs: dict[str, Cost | str] = {feature: ELSEWHERE[feature] for feature in lost if feature in ELSEWHERE}
    wanted = [feature for feature in MEASURED if feature in lost]
    if wanted:
        try:
            text, found = _measure(config, plan["converted"], wanted)
            costs |= found
        except UserError as error:
            costs |= dict.fromkeys(wanted, str(error))
    added = [{**row, "measured": _plain(costs[row["feature"]]) if row["feature"] in lost else None} for row in rows]
    return {**plan, "treatment": added, "measured_on": text}


def _measure(config: RunConfig, layers: list[int], features: list[str]) -> tuple[dict[str, Any], dict[str, Cost | str]]:
    source = config.teacher
    teacher, tokenizer = load_teacher(source.source, source.revision, source.trust_remote_code)
    name, windows_WL = _heldout(config, tokenizer)
    text = {"set": name, "windows": windows_WL.shape[0], "window": windows_WL.shape[1]}
    return text, measure(teacher, family_of(teacher.config), layers, features, windows_WL)


def _heldout(config: RunConfig, tokenizer: Any) -> tuple[str, Tensor]:
    """The first held-out set with a window, and the first of its windows, [W, L]."""
    window = config.data.window
    # of the training text, packing asks for one window; held-out text is always whole
    data = dataclasses.replace(config.data, max_tokens=window + 1)
    with tempfile.TemporaryDirectory() as folder:
        packed = open_or_pack(data, tokenizer, Path(folder) / "data", lambda _line: None)
        for name in packed.heldout_names():
            windows_WL = packed.heldout_windows(name, window, TOKENS)
            if len(windows_WL):
                return name, windows_WL
    raise fail(
        "data.window", "must fit the held-out text to measure on it", window, "Take shorter windows or add text."
    )


def _plain(cost: Cost | str) -> dict[str, Any]:
    if isinstance(cost, str):
        return {"not_measured": cost}
    layer, error = cost.worst()
    return {"median": cost.median(), "worst": error, "worst_layer": layer}
