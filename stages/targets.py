"""What a logits stage distils towards: teachers that run beside the student, or what was stored of them.

B batch, L window length, T tokens that predict one, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ssmorph.convert.families import family_of
from ssmorph.convert.teachers import load_config, load_teacher, load_tokenizer
from ssmorph.kernels.distill import Side, distill_ensemble_loss, distill_loss

from ..errors import fail
from .config import SELF, LogitsStage, RunConfig, StageTeacher
from .context import Context
from .data import TokenBatch

# (the student's end, labels [T], mask [T]) -> loss
Distance = Callable[[Side, Tensor, Tensor], Tensor]


class Target(Protocol):
    """A stage's target: `read` runs or looks up the teachers of a batch; `runs_own` says whether the run's own one ran.

    `vocabulary` is how many rows of the student's head take part.
    """

    runs_own: bool
    vocabulary: int

    def read(self, batch: TokenBatch) -> Distance:
        """The loss of a student on this batch."""
        ...


class _Guide(NamedTuple):
    model: Any
    weight: float
    # factor and soft cap of its logits, by its family
    logits: tuple[float, float | None]


class Live:
    """The stage's teachers, loaded for as long as it lasts."""

    def __init__(self, ctx: Context, stage: LogitsStage) -> None:
        self.stage = stage
        self.guides = [_guide(ctx, teacher) for teacher in stage.teachers]
        self.runs_own = any(teacher.source == SELF for teacher in stage.teachers)
        models = [ctx.teacher, *(guide.model for guide in self.guides)]
        # families pad the same vocabulary to different sizes; rows that not all have are no token's
        self.vocabulary = min(model.get_output_embeddings().weight.shape[0] for model in models)

    @property
    def weights(self) -> list[float]:
        """The teachers' weights, as the recipe has them."""
        return [guide.weight for guide in self.guides]

    @torch.no_grad()
    def ends(self, tokens_BL: Tensor) -> list[Side]:
        """Each teacher's final hidden states of tokens that predict one, and its head."""
        return [
            end_of(guide.model, guide.logits, final_states(guide.model, tokens_BL), self.vocabulary)
            for guide in self.guides
        ]

    def read(self, batch: TokenBatch) -> Distance:
        """See `Target`."""
        return partial(divergence, self.stage, self.ends(batch.tokens_BL), self.weights)


def _guide(ctx: Context, teacher: StageTeacher) -> _Guide:
    if teacher.source == SELF:
        return _Guide(ctx.teacher, teacher.weight, ctx.spec.logits(ctx.teacher.config))
    ctx.say(f"loading the teacher {teacher.source}")
    model, _ = load_teacher(teacher.source, teacher.revision, teacher.trust_remote_code, ctx.config.device)
    model.requires_grad_(False)
    return _Guide(model, teacher.weight, family_of(model.config).logits(model.config))


def final_states(model: Any, tokens_BL: Tensor) -> Tensor:
    """Final hidden states of every token but a window's last, [T, D]."""
    states_TD: Tensor = model.base_model(tokens_BL, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    return states_TD


def end_of(model: Any, logits: tuple[float, float | None], hidden_TD: Tensor, vocabulary: int | None = None) -> Side:
    """A model's end: states and head, of the first `vocabulary` tokens, with the factor and soft cap of its logits."""
    head = model.get_output_embeddings()
    weight_VD, bias_V = head.weight, head.bias
    if vocabulary is not None and vocabulary < weight_VD.shape[0]:
        weight_VD, bias_V = weight_VD[:vocabulary], None if bias_V is None else bias_V[:vocabulary]
    return Side(hidden_TD, weight_VD, bias_V, *logits)


def divergence(
    stage: LogitsStage,
    teachers: Sequence[Side],
    weights: Sequence[float],
    student: Side,
    labels_T: Tensor,
    mask_T: Tensor,
) -> Tensor:
    """The stage's loss, with all models' heads as their families compute logits."""
    labels = labels_T if stage.ce_weight else None
    if len(teachers) > 1:
        return distill_ensemble_loss(
            student, teachers, weights, loss=stage.loss, temperature=stage.temperature, beta=stage.jsd_beta,
            labels_T=labels, ce_weight=stage.ce_weight, mask_T=mask_T,
        )  # fmt: skip
    (teacher,) = teachers
    return distill_loss(
        student.hidden_TD, student.head_VD, teacher.hidden_TD, teacher.head_VD,
        loss=stage.loss, temperature=stage.temperature, beta=stage.jsd_beta,
        labels_T=labels, ce_weight=stage.ce_weight, mask_T=mask_T,
        student_bias_V=student.bias_V, teacher_bias_V=teacher.bias_V,
        student_scale=student.scale, teacher_scale=teacher.scale,
        student_softcap=student.softcap, teacher_softcap=teacher.softcap,
    )  # fmt: skip


def check_targets(config: RunConfig, indices: Sequence[int]) -> None:
    """Refuses what stages could not distil towards, before any weight is read: `indices` are those yet to run.

    Raises:
        ValueError: an unsupported family, another vocabulary than the converted teacher's, logits that nobody stored.
    """
    own = None
    for index in indices:
        stage = config.stages[index]
        if not isinstance(stage, LogitsStage):
            continue
        for number, teacher in enumerate(stage.teachers):
            if teacher.source != SELF:
                t = config.teacher
                own = own or load_tokenizer(t.source, t.revision, t.trust_remote_code)
                _check_vocabulary(f"stages[{index}].teachers[{number}]", teacher, own)


def _check_vocabulary(where: str, teacher: StageTeacher, own: Any) -> None:
    """Ids must mean the same; how text is split is not asked, since the converted teacher's tokenizer does it."""
    found = load_config(teacher.source, teacher.revision, teacher.trust_remote_code)
    theirs = load_tokenizer(teacher.source, teacher.revision, teacher.trust_remote_code).get_vocab()
    ours = own.get_vocab()
    other = sorted(token for token in {**ours, **theirs} if ours.get(token) != theirs.get(token))
    if other:
        got = f"{teacher.source}, where {len(other)} tokens differ, first {other[0]!r}"
        raise fail(where, "must have the converted teacher's vocabulary", got, "Use a model of the same family.")
    if len(ours) > found.vocab_size:
        raise fail(where, f"must have embeddings for {len(ours)} tokens", found.vocab_size, "Use another model.")
