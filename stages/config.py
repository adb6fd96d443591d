"""The recipe: one tree of frozen dataclasses, which is the YAML file, the command line and the saved config.yaml.

Standard library only, so that a mistake in a recipe is answered before torch is imported. Rules that need the model
(a layer out of range, a head count) are checked where the model is read: convert/plan.py.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from ssmorph.convert.plan import strategy_of

from ..errors import require
from .student_config import HEADS, WINDOWED, PlacementConfig, StudentConfig

RUN_FORMAT = 1
# as a stage's teacher: the model that is converted
SELF = "self"
# windows in a batch of the calibration stage
CALIBRATION_BATCH = 2


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The pretrained transformer: a local folder, a GGUF file, a hub id, or the alias `smollm2-135m`."""

    source: str
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Text to train on. `sources`: `default` (text in installed packages), parts of it, files, folders, `hub:NAME`."""

    sources: tuple[str, ...] = ("default",)
    window: int = 512
    heldout_percent: float = 4.0
    max_tokens: int | None = None
    loss_on: Literal["all", "answers"] = "all"
    text_field: str = "text"

    def __post_init__(self) -> None:
        require(len(self.sources) > 0, "data.sources", "needs at least one source", "none", "Use [default].")
        require(self.window >= 8, "data.window", "must be at least 8 tokens", self.window, "Use 512.")
        require(
            0 < self.heldout_percent < 50,
            "data.heldout_percent",
            "must lie between 0 and 50",
            self.heldout_percent,
            "Use 4.",
        )
        require(
            # packing asks for a token more than one window
            self.max_tokens is None or self.max_tokens > self.window,
            "data.max_tokens",
            f"must be larger than the window of {self.window} tokens",
            self.max_tokens,
            "Raise it, leave it out, or lower data.window.",
        )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with a warm-up / stable / decay schedule; `rest_lr` 0 freezes all but the mixers.

    `relative` (optim.py): rates are shares of a row's size per step, and each layer's gradient is clipped on its own.
    `adamw`: rates as papers print them, and one norm is clipped over all that is trained. Rates are peaks.
    `depth_ratio`: the last layer's rate over the first one's; between them it changes by equal factors.
    """

    kind: Literal["relative", "adamw"] = "relative"
    lr: float = 3e-4
    rest_lr: float = 0.0
    depth_ratio: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    warmup_percent: float = 20.0
    decay_percent: float = 40.0
    decay_shape: Literal["linear", "cosine"] = "linear"
    final_lr_ratio: float = 0.0
    clip: float = 1.0

    def __post_init__(self) -> None:
        for name in ("lr", "clip", "depth_ratio"):
            require(
                getattr(self, name) > 0, f"optim.{name}", "must be positive", getattr(self, name), "Use the default."
            )
        for name in ("rest_lr", "weight_decay", "warmup_percent", "decay_percent", "final_lr_ratio"):
            require(
                getattr(self, name) >= 0, f"optim.{name}", "must not be negative", getattr(self, name), "Use 0 or more."
            )
        both = self.warmup_percent + self.decay_percent
        require(
            both <= 100, "optim", "warmup_percent + decay_percent must not exceed 100", both, "Shorten one of them."
        )
        require(
            all(0 <= b < 1 for b in self.betas), "optim.betas", "must lie in [0, 1)", self.betas, "Use [0.9, 0.95]."
        )


@dataclass(frozen=True, kw_only=True)
class SurgeryStage:
    """Puts mixers into the planned layers; trains nothing.

    `init` copy: q, k, v, o are copied and the rest is set so that attention shows through. `projections`: they are
    copied and the rest starts as the published mixer does. `random`: all of a mixer starts as published.
    """

    kind: Literal["surgery"] = "surgery"
    init: Literal["copy", "projections", "random"] = "copy"


@dataclass(frozen=True, kw_only=True)
class CalibrateStage:
    """Closed-form initialisation from `tokens` tokens: decay, gate, convolution, output projection.

    `refine_steps` gradient steps per layer follow on the same tokens, their rate falling from `refine_lr`.
    """

    kind: Literal["calibrate"] = "calibrate"
    tokens: int = 16_384
    decay: Literal["output", "distance"] = "output"
    inputs: Literal["student", "teacher"] = "student"
    refine_steps: int = 126
    refine_lr: float = 1e-3

    def __post_init__(self) -> None:
        require(self.tokens > 0, "calibrate.tokens", "must be positive", self.tokens, "Use 16384.")
        require(self.refine_steps >= 0, "calibrate.refine_steps", "must not be negative", self.refine_steps, "Use 0.")
        require(0 < self.refine_lr < 1, "calibrate.refine_lr", "must lie between 0 and 1", self.refine_lr, "Use 1e-3.")


@dataclass(frozen=True, kw_only=True)
class TrainStage:
    """What the three gradient stages share. A step sees `batch` windows; the stage ends after `tokens` tokens."""

    tokens: int = 65_536
    batch: int = 2
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint_every: int = 50
    keep: int = 1

    def __post_init__(self) -> None:
        for name in ("tokens", "batch", "checkpoint_every", "keep"):
            value = getattr(self, name)
            require(value > 0, f"{type(self).__name__}.{name}", "must be positive", value, "Use 1 or more.")


@dataclass(frozen=True, kw_only=True)
class MixingStage(TrainStage):
    """MOHAWK's matrix orientation: each mixer's matrix towards the teacher's attention, on the teacher's inputs."""

    kind: Literal["mixing"] = "mixing"
    loss: Literal["frobenius", "cosine"] = "cosine"


@dataclass(frozen=True, kw_only=True)
class HiddenStage(TrainStage):
    """Hidden-state alignment on the teacher's inputs: the mixer's own output, or the whole block's.

    `l2` and `mse` are divided by the teacher's size, so every layer weighs the same; `cosine` leaves the size free.
    """

    kind: Literal["hidden"] = "hidden"
    target: Literal["mixer", "block"] = "mixer"
    loss: Literal["l2", "mse", "cosine"] = "l2"


@dataclass(frozen=True, kw_only=True)
class StageTeacher:
    """A model that a logits stage distils towards, of the same vocabulary; `self` is the one that is converted."""

    source: str = SELF
    weight: float = 1.0
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        ok = 0 < self.weight < float("inf")
        require(ok, "StageTeacher.weight", "must be positive", self.weight, "Leave out a teacher of weight 0.")


@dataclass(frozen=True, kw_only=True)
class LogitsStage(TrainStage):
    """End-to-end distillation: the student's next-token distribution towards the teacher's.

    Of several `teachers` the logits are averaged by weight. With `offline`, a folder, the stage reads what the command
    `data logits` stored there: each position's `offline_top_k` likeliest tokens, in `offline_dtype`, and the sum of the
    rest.
    `layer_weight` adds a distance of converted blocks' outputs: `l2` relative to the teacher's size and the mean over
    layers, `frobenius` as MaTVLM has it. With `layer_inputs` teacher, the blocks get the teacher's inputs there.
    """

    kind: Literal["logits"] = "logits"
    loss: Literal["kl", "reverse_kl", "jsd"] = "kl"
    temperature: float = 1.0
    jsd_beta: float = 0.5
    ce_weight: float = 0.0
    layer_weight: float = 0.0
    layer_loss: Literal["l2", "frobenius"] = "l2"
    layer_inputs: Literal["student", "teacher"] = "student"
    gradient_checkpointing: bool = False
    teachers: tuple[StageTeacher, ...] = (StageTeacher(),)
    offline: str | None = None
    offline_top_k: int = 64
    offline_dtype: Literal["float16", "bfloat16", "float32"] = "float16"

    def __post_init__(self) -> None:
        TrainStage.__post_init__(self)
        require(self.temperature > 0, "logits.temperature", "must be positive", self.temperature, "Use 1.")
        require(0 < self.jsd_beta < 1, "logits.jsd_beta", "must lie in (0, 1)", self.jsd_beta, "Use 0.5.")
        for name in ("ce_weight", "layer_weight"):
            require(getattr(self, name) >= 0, f"logits.{name}", "must not be negative", getattr(self, name), "Use 0.")
        sources = [teacher.source for teacher in self.teachers]
        require(len(set(sources)) == len(sources) > 0, "logits.teachers", "needs one or more, each once", sources,
                 f"Use [{{source: {SELF}}}].")  # fmt: skip
        require(self.offline is None or self.loss == "kl", "logits.loss", "stored logits know kl alone", self.loss,
                 "Use kl, or leave offline out.")  # fmt: skip
        require(self.offline_top_k > 0, "logits.offline_top_k", "must be positive", self.offline_top_k, "Use 64.")


Stage = SurgeryStage | CalibrateStage | MixingStage | HiddenStage | LogitsStage
STAGES: dict[str, type] = {"surgery": SurgeryStage, "calibrate": CalibrateStage, "mixing": MixingStage,
                           "hidden": HiddenStage, "logits": LogitsStage}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How much the closing evaluation measures; `short` is what the demo runs.

    `trained_controls`: windows without a state are trained on the same tokens and compared, which takes as long again.
    """

    suite: Literal["none", "short", "full"] = "short"
    tokens: int = 6_144
    controls: bool = True
    trained_controls: bool = False

    def __post_init__(self) -> None:
        require(self.tokens > 0, "evaluate.tokens", "must be positive", self.tokens, "Use 6144.")


def default_stages(mixer: str = "mamba2") -> tuple[Stage, ...]:
    """The usual order: copy, calibrate, align the matrices where the mixer has one, align the outputs, distil."""
    matrices = () if mixer in WINDOWED else (MixingStage(),)
    return (SurgeryStage(), CalibrateStage(), *matrices, HiddenStage(), LogitsStage())


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run: teacher, plan, data, the list of stages, evaluation."""

    teacher: TeacherConfig
    run_dir: str
    student: StudentConfig = field(default_factory=StudentConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    data: DataConfig = field(default_factory=DataConfig)
    stages: tuple[Stage, ...] = field(default_factory=default_stages)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    seed: int = 0
    threads: int | None = None
    tracker: Literal["none", "wandb", "tensorboard"] = "none"
    device: str = "cpu"
    run_format: int = RUN_FORMAT

    def __post_init__(self) -> None:
        kinds = [stage.kind for stage in self.stages]
        require(kinds[:1] == ["surgery"], "stages", "the first stage is surgery", kinds, "Put {kind: surgery} first.")
        require(kinds.count("surgery") == 1, "stages", "surgery comes once", kinds, "Remove the second.")
        copies = isinstance(self.stages[0], SurgeryStage) and self.stages[0].init == "copy"
        require(copies or "calibrate" not in kinds, "stages.surgery.init", "calibration starts from a copy",
                 getattr(self.stages[0], "init", None), "Use copy, or leave calibrate out.")  # fmt: skip
        if self.student.mixer in WINDOWED:
            require(copies, "stages.surgery.init", "a window is of the attention's own copy",
                     getattr(self.stages[0], "init", None), "Use copy.")  # fmt: skip
            require("mixing" not in kinds, "stages", "a window with a state behind it has no mixing matrix",
                     self.student.mixer, "Use calibrate, hidden and logits.")  # fmt: skip
        if self.student.mixer == HEADS:
            require(copies, "stages.surgery.init", "kept heads are the attention's own copy",
                     getattr(self.stages[0], "init", None), "Use copy.")  # fmt: skip
        frobenius = any(isinstance(s, MixingStage) and s.loss == "frobenius" for s in self.stages)
        require(not (frobenius and self.student.mixer in ("mamba2", HEADS)), "stages.mixing.loss",
                 "frobenius needs a mixer without a norm", self.student.mixer, "Use cosine.")  # fmt: skip
        self._check_placement()
        require(self.seed >= 0, "seed", "must not be negative", self.seed, "Use 0.")
        require(self.seed < 2**63, "seed", "must be below 2^63", self.seed, "Use 0.")
        require(self.run_dir != "", "run_dir", "must name a folder", "nothing", "Use runs/NAME, or '.' for this one.")
        require(self.threads is None or self.threads > 0, "threads", "must be positive", self.threads, "Leave it out.")
        require(self.run_format == RUN_FORMAT, "run_format", f"this version writes and reads format {RUN_FORMAT}",
                 self.run_format, "Convert with the version that made the run.")  # fmt: skip

    def _check_placement(self) -> None:
        strategy, budget = strategy_of(self.student.layers), self.placement.cache_mib
        by_bytes = strategy is not None and strategy.layers is None
        require(not by_bytes or budget is not None, "student.layers", "needs K, or placement.cache_mib instead",
                 self.student.layers, f"Write {self.student.layers}-15.")  # fmt: skip
        require(by_bytes or budget is None, "placement.cache_mib", "decides in place of the K of student.layers",
                 self.student.layers, "Leave one of them out.")  # fmt: skip
        spread = by_bytes and strategy is not None and strategy.name == "smart"
        require(not spread, "student.layers", "smart needs K", self.student.layers, "Write smart-15, or use loo.")
        listed = isinstance(self.student.heads, tuple) and len(self.student.heads) > 0
        scored = strategy is not None and strategy.scored
        require(not (listed and scored), "student.heads", "a list needs layers that are known before scores",
                 self.student.layers, "Use 'retrieval-N', or list the layers.")  # fmt: skip
        trained = strategy is None or strategy.name != "gates" or self.placement.train_tokens > 0
        require(trained, "placement.train_tokens", "gates are trained", 0, "Use 8192.")

    def stage_names(self) -> list[str]:
        """Folder names of the stages: index-kind, as the recipe lists them."""
        return [f"{index}-{stage.kind}" for index, stage in enumerate(self.stages)]


def as_dict(config: object) -> dict:
    """The tree as plain lists, dicts and scalars: what config.yaml holds."""
    return dataclasses.asdict(
        config, dict_factory=lambda items: {k: list(v) if isinstance(v, tuple) else v for k, v in items}
    )  # type: ignore[call-overload]
