"""Which layers are converted, where `student.layers` asks for scores: how much is lost when a layer has no attention.

Scores are kept in the run directory, placement/NAME.json, after every layer; a killed run goes on behind the last.
Students that scoring needs are made by the stages themselves, in run directories of their own under placement/, so they
stop and resume as any run does; they are removed once the scores are whole.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ssmorph.convert.families import AttentionShape, FamilySpec
from ssmorph.convert.mixers import has_window
from ssmorph.convert.plan import (
    Strategy,
    attention_bytes,
    cache_bytes,
    cheapest_fitting,
    lowest,
    resolve_layers,
    retrieval_count,
    spread_lowest,
    strategy_of,
)
from ssmorph.convert.surgery import MixerChoice, shape_of

from .config import (
    CALIBRATION_BATCH,
    CalibrateStage,
    LogitsStage,
    OptimConfig,
    PlacementConfig,
    RunConfig,
    Stage,
    StudentConfig,
    SurgeryStage,
    as_dict,
)
from .context import Context
from .kept_heads import heads_importance
from .nested import RunStages, plain_config, staged_student
from .placement_gates import GateState, train_gates
from .rundir import RunDir, remove_folder
from .scores import Candidate, score
from .silence import restored

FOLDER = "placement"
FLOAT32 = 4


def placed_layers(ctx: Context, run_stages: RunStages) -> tuple[int, ...]:
    """The layers to convert. Scores that are not there yet are measured, which takes minutes to hours.

    Raises:
        ValueError: a budget of bytes that no choice of layers fits.
        Interrupted: a signal came; what was scored is kept.
    """
    layers, total = ctx.config.student.layers, len(ctx.spec.decoder_layers(ctx.teacher))
    strategy = strategy_of(layers)
    if strategy is None or not strategy.scored:
        return resolve_layers(layers, total)
    count = len(converted_before_scores(ctx.config, ctx.spec, ctx.teacher.config))
    ctx.run.stage_dir(FOLDER)
    scores = Scoring(ctx, strategy.name, total - count, run_stages).scores()
    chosen = choose(ctx.config, ctx.spec, ctx.teacher.config, scores)
    ctx.say(f"placement {strategy.name}: converts {', '.join(map(str, chosen))}")
    return chosen


def choose(config: RunConfig, spec: FamilySpec, teacher_config: Any, scores: list[float]) -> tuple[int, ...]:
    """The layers that a scored strategy converts, from the scores of all."""
    strategy = strategy_of(config.student.layers)
    assert strategy is not None
    if strategy.layers is None:
        attention, placement = spec.shape(teacher_config), config.placement
        assert placement.cache_mib is not None
        windows = [spec.window(teacher_config, i) for i in range(attention.layers)]
        held = attention_bytes(attention, windows, placement.context, FLOAT32)
        # at worst every kept head reads a key/value head of its own, over the whole context
        kept = (retrieval_count(config.student.heads) or 0) * 2 * attention.head_dim * FLOAT32 * placement.context
        budget = int(placement.cache_mib * 2**20) - kept
        return cheapest_fitting(scores, held, _mixer_bytes(config, attention), budget)
    return (spread_lowest if strategy.name == "smart" else lowest)(scores, strategy.layers)


def converted_before_scores(config: RunConfig, spec: FamilySpec, teacher_config: Any) -> tuple[int, ...]:
    """What can be told of a scored strategy's layers: with K as many, with a budget those of scores that are equal."""
    strategy, total = strategy_of(config.student.layers), spec.shape(teacher_config).layers
    if strategy is not None and strategy.layers is None:
        return choose(config, spec, teacher_config, [1.0] * total)
    return resolve_layers(config.student.layers, total)


def _mixer_bytes(config: RunConfig, attention: AttentionShape) -> int:
    student = config.student
    choice = MixerChoice(kind=student.mixer, conv_kernel=student.conv_kernel, window=student.window,
                         sinks=student.sinks, state=student.state)  # fmt: skip
    return cache_bytes(shape_of(attention, choice), FLOAT32)


class Scoring:
    """One strategy's scores of all layers, and the file that keeps them."""

    def __init__(self, ctx: Context, name: str, kept: int, run_stages: RunStages) -> None:
        self.ctx, self.kept, self.run_stages = ctx, kept, run_stages
        # smart differs in what it makes of the scores
        self.name = "loo" if name == "smart" else name
        self.total = len(ctx.spec.decoder_layers(ctx.teacher))
        self.file = f"{FOLDER}/{self.name}.json"
        fresh = {"stamp": self._stamp(), "done": False, "scores": [None] * self.total}
        found = ctx.run.read_json(self.file)
        self.record: dict[str, Any] = found if found and found["stamp"] == fresh["stamp"] else fresh

    def scores(self) -> list[float]:
        """Measures what is missing."""
        if not self.record["done"]:
            known = sum(value is not None for value in self.record["scores"])
            self.ctx.say(f"placement {self.name}: scoring {self.total - known} layers")
            measure = {"loo": self._loo, "kl": self._kl, "retrieval": self._retrieval, "gates": self._gates}
            measure[self.name]()
            self._save(done=True)
            self._remove_student()
        return self.record["scores"]

    def _stamp(self) -> dict[str, Any]:
        """All that the scores depend on."""
        config = plain_config(self.ctx.config, (SurgeryStage(),))
        placement = as_dict(dataclasses.replace(self.ctx.config.placement, cache_mib=None, context=1))
        if self.name == "retrieval" and has_window(config.student.mixer):
            # asked otherwise before: scores of then are of no use
            placement |= {"behind": "window"}
        return {"config": as_dict(config), "placement": placement, "kept": self.kept if self.name == "gates" else None}

    def _save(self, **changes: Any) -> None:
        self.record |= changes
        self.ctx.run.write_json(self.file, self.record)

    def _student(self, stages: tuple[Stage, ...]) -> Any:
        return staged_student(
            self.ctx, f"{FOLDER}/{self.name}", _of(self.ctx, range(self.total)), stages, self.run_stages
        )

    def _remove_student(self) -> None:
        folder = self.ctx.run.path / FOLDER / self.name
        if folder.is_dir():
            remove_folder(folder)

    def _loo(self) -> None:
        """KL of the teacher with one layer's attention replaced by its mixer, fitted on the teacher's own inputs."""
        student = self._student((SurgeryStage(), _calibration(self.ctx.config.placement, "teacher")))
        self._layer_by_layer(student, lambda i: [j for j in range(self.total) if j != i], lambda kl: kl)

    def _kl(self) -> None:
        """KL that a student without attention gains back by one layer's [2512.20569]."""
        placement = self.ctx.config.placement
        stages: tuple[Stage, ...] = (SurgeryStage(), _calibration(placement, "student"))
        if placement.train_tokens:
            optim = OptimConfig(lr=placement.lr, warmup_percent=10, decay_percent=90)
            stages += (LogitsStage(tokens=placement.train_tokens, batch=1, optim=optim, checkpoint_every=16),)
        student = self._student(stages)
        if "whole" not in self.record:
            self._save(whole=self._divergence(student, []))
        whole = self.record["whole"]
        self._layer_by_layer(student, lambda i: [i], lambda kl: whole - kl)

    def _layer_by_layer(
        self, student: Any, attending: Callable[[int], list[int]], value: Callable[[float], float]
    ) -> None:
        """Scores each layer by the KL of `student` with the teacher's attention in the layers `attending` names."""
        scores = self.record["scores"]
        for i in range(self.total):
            if scores[i] is None:
                scores[i] = value(self._divergence(student, attending(i)))
                self._save()
                self.ctx.say(f"placement {self.name}: layer {i} of {self.total}, {scores[i]:.4f}")
                self.ctx.stop.check()

    def _divergence(self, student: Any, attending: list[int]) -> float:
        """KL(teacher || student), nats, on training tokens that calibration did not read."""
        context = partial(restored, student, self.ctx.teacher, self.ctx.spec, attending)
        candidate = Candidate("student", student, context)
        return score(self.ctx.teacher, [candidate], self._windows())["student"].summary()["kl"]

    def _windows(self) -> Tensor:
        """Windows [W, L] that follow those of calibration in its own order of the text."""
        placement, window = self.ctx.config.placement, self.ctx.config.data.window
        # calibration is stage 1 of the student's run
        read = max(2, math.ceil(placement.calibration_tokens / (CALIBRATION_BATCH * window)))
        count = math.ceil(placement.score_tokens / (CALIBRATION_BATCH * window))
        batches = [self.ctx.batch(1, read + step, CALIBRATION_BATCH).tokens_BL for step in range(count)]
        return torch.cat(batches)[: max(1, placement.score_tokens // window)]

    def _retrieval(self) -> None:
        """The sum over a layer's heads of how much each matters to fetching a value by its key."""
        heads = heads_importance(self.ctx)
        self._save(heads=heads.tolist(), scores=heads.sum(1).tolist())

    def _gates(self) -> None:
        """What is left of each layer's attention after a budget for all of them was trained."""
        student = self._student((SurgeryStage(), _calibration(self.ctx.config.placement, "teacher")))
        state = GateState(**self.record["state"]) if "state" in self.record else None
        gates = train_gates(self.ctx, student, self.kept, state, lambda s: self._save(state=dataclasses.asdict(s)))
        self._save(scores=gates)


def _of(ctx: Context, layers: Iterable[int]) -> StudentConfig:
    """The recipe's student, of these layers."""
    return dataclasses.replace(ctx.config.student, layers=tuple(layers))


def _calibration(placement: PlacementConfig, inputs: Literal["student", "teacher"]) -> CalibrateStage:
    # closed forms alone: nothing is trained before layers are chosen
    return CalibrateStage(tokens=placement.calibration_tokens, inputs=inputs, refine_steps=0)


def control_students(
    ctx: Context, layers: tuple[int, ...], run_stages: RunStages
) -> list[tuple[str, Callable[[], Any]]]:
    """(name, loader) of what shows whether scores were worth it: `placed` and `uniform`, the same number of layers.

    Both are calibrated on the same tokens and not trained. None where `student.layers` is not scored.
    """
    strategy = strategy_of(ctx.config.student.layers)
    if strategy is None or not strategy.scored or not layers:
        return []
    uniform = resolve_layers(f"uniform-{len(layers)}", len(ctx.spec.decoder_layers(ctx.teacher)))
    stages = (SurgeryStage(), _calibration(ctx.config.placement, "student"))

    def make(name: str, chosen: tuple[int, ...]) -> Any:
        student = staged_student(ctx, f"{FOLDER}/{name}", _of(ctx, chosen), stages, run_stages)
        remove_folder(ctx.run.path / FOLDER / name)
        return student

    return [("placed", partial(make, "placed", layers)), ("uniform", partial(make, "uniform", uniform))]


def described(config: RunConfig, strategy: Strategy | None, run: RunDir) -> dict[str, Any]:
    """What plan.json says of a scored placement; nothing of another."""
    if strategy is None or not strategy.scored:
        return {}
    name = "loo" if strategy.name == "smart" else strategy.name
    return {"placement": config.student.layers, "scores": run.read_json(f"{FOLDER}/{name}.json")["scores"]}
