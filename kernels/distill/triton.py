"""The distillation losses on a GPU: logits of a chunk by torch.mm, one Triton kernel over them, gradients by torch.mm.

Matrices are multiplied in each side's own dtype, but logits are kept in float32: the gradient is a difference of two
similar distributions, and logits rounded to bfloat16 put it 5 to 25 % off for a student near its teacher. Gradients of
logits are in the student's dtype (for float32 over its logits), losses and sums over tokens in float32. A chunk takes
two float32 buffers [C, V] (one, where the teacher comes in buckets; three for several teachers), one for gradients.

T tokens, C tokens of a chunk, K kept tokens of the teacher, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
from torch import Tensor

from ssmorph.errors import fail

from ..common.gpu import architecture
from ..common.launch import launch, recorded
from ..common.shipped import Shipped
from .driver import through_head
from .objective import DIVERGENCES, NEVER, Buckets, Ensemble, Objective, Side, chunk_rows, cross_entropy_share
from .triton_kernels import buckets_kernel, heads_kernel

# bytes of a gradient -> tokens of the vocabulary at a time without options and with (they take registers), warps
LAUNCHES = {
    "sm_90": {2: (4096, 2048, 8), 4: (2048, 2048, 8)},
    "sm_80": {2: (4096, 2048, 8), 4: (2048, 2048, 8)},
    "gfx942": {2: (4096, 2048, 8), 4: (2048, 2048, 8)},
}
# bytes of the chunk buffers where the heads take less, the row count they are rounded to, and the most known tokens
BUDGET, ROWS, MOST_KNOWN = 1 << 30, 128, 4096
STAGES = 3


def distill_triton(student: Side, teacher: Side | Ensemble, labels_T: Tensor | None, objective: Objective) -> Tensor:
    """The scalar loss."""
    if isinstance(teacher, Ensemble):
        sides = tuple(_in_own_dtype("distill_ensemble_loss", side) for side in teacher.sides)
        return _loss("distill_ensemble_loss", student, replace(teacher, sides=sides), labels_T, objective)
    return _loss("distill_loss", student, _in_own_dtype("distill_loss", teacher), labels_T, objective)


def topk_triton(student: Side, teacher: Buckets, labels_T: Tensor | None, objective: Objective) -> Tensor:
    """The scalar loss."""
    if teacher.indices_TK.shape[1] > MOST_KNOWN:
        rule = f"'triton' takes at most {MOST_KNOWN} known tokens"
        raise fail("distill_topk_loss.backend", rule, teacher.indices_TK.shape[1], "Use backend 'chunked'.")
    return _loss("distill_topk_loss", student, teacher, labels_T, objective)


def _loss(
    op: str, student: Side, teacher: Side | Ensemble | Buckets, labels_T: Tensor | None, objective: Objective
) -> Tensor:
    student = _in_own_dtype(op, student)
    chunks = _Chunks(student, teacher, labels_T, objective)
    return through_head(student.hidden_TD, student.head_VD, student.bias_V, chunks)


def _in_own_dtype(op: str, side: Side) -> Side:
    if side.dtype == torch.float64:
        raise fail(f"{op}.backend", "'triton' computes in float32", side.dtype, "Use backend 'chunked'.")
    return replace(side, hidden_TD=side.hidden_TD.to(side.dtype), head_VD=side.head_VD.to(side.dtype))


def row_limit(vocabulary: int, width: int, size: int, buffers: int) -> int:
    """Tokens whose buffers take no more than two heads do: fewer make each pass over the heads too dear."""
    row = vocabulary * (4 * buffers + (size if size < 4 else 0))
    return max(BUDGET, 2 * vocabulary * width * size) // row


class _Chunks:
    """See `driver.Chunks`."""

    def __init__(
        self, student: Side, teacher: Side | Ensemble | Buckets, labels_T: Tensor | None, objective: Objective
    ) -> None:
        self.student, self.teacher, self.objective = student, teacher, objective
        (tokens, width), vocabulary = student.hidden_TD.shape, student.head_VD.shape[0]
        # a mean of logits comes to the kernel finished
        target = (
            replace(teacher.sides[0], bias_V=None, scale=1.0, softcap=None)
            if isinstance(teacher, Ensemble)
            else teacher
        )
        sides = [student, target] if isinstance(target, Side) else [student]
        held = len(sides) + isinstance(teacher, Ensemble)
        self.target = target
        size = student.hidden_TD.element_size()
        most = objective.chunk or row_limit(vocabulary, width, size, held)
        self.rows = chunk_rows(tokens, most, 1 if objective.chunk else ROWS)
        # rows of 16 elements, for aligned loads
        shape = (self.rows, -(-vocabulary // 16) * 16)
        self.buffers = [student.hidden_TD.new_empty(shape, dtype=torch.float32)[:, :vocabulary] for _ in range(held)]
        in_place = student.dtype == torch.float32
        self.grads = self.buffers[0] if in_place else student.hidden_TD.new_empty(shape)[:, :vocabulary]
        self.biases = [None if side.bias_V is None else side.bias_V.detach().float().clamp(min=NEVER) for side in sides]
        self.labels_T = None if labels_T is None else labels_T.long().contiguous()
        share = cross_entropy_share(labels_T, objective)
        self.share = None if share is None else share.float()
        options = labels_T is not None or any(side.bias_V is not None or side.softcap is not None for side in sides)
        *blocks, self.warps = LAUNCHES[architecture(student.hidden_TD.device)][size]
        self.options = " with options" if options else ""
        self.block = min(blocks[options], max(triton.next_power_of_2(vocabulary), 16))

    def step(self, hidden_CD: Tensor, rows: slice, losses_C: Tensor, grads: bool) -> Tensor:
        count = hidden_CD.shape[0]
        logits = [buffer[:count] for buffer in self.buffers]
        grads_CV = self.grads[:count]
        _logits(hidden_CD, self.student.head_VD, logits[0])
        labels_C = None if self.labels_T is None else self.labels_T[rows]
        if isinstance(self.target, Buckets):
            self._buckets(self.target, logits[0], grads_CV, rows, labels_C, losses_C, grads)
            return grads_CV
        if isinstance(self.teacher, Ensemble):
            self.teacher.mean(lambda side, out: _logits(side.hidden_TD[rows], side.head_VD, out), logits[1], logits[2])
        else:
            _logits(self.target.hidden_TD[rows], self.target.head_VD, logits[1])
        self._heads(self.target, [*logits[:2], grads_CV], labels_C, losses_C, grads)
        return grads_CV

    def _heads(
        self, teacher: Side, logits: list[Tensor], labels_C: Tensor | None, losses_C: Tensor, grads: bool
    ) -> None:
        (student_CV, teacher_CV, grads_CV), objective, student = logits, self.objective, self.student
        launch(
            heads_kernel, (len(losses_C),), student_CV, teacher_CV, grads_CV, *(_or(b, losses_C) for b in self.biases),
            _or(labels_C, losses_C), _or(self.share, losses_C), losses_C,
            student_CV.stride(0), teacher_CV.stride(0), grads_CV.stride(0), student_CV.shape[1],
            objective.temperature, objective.beta, student.scale, teacher.scale,
            student.softcap or 1.0, teacher.softcap or 1.0, LOSS=objective.loss,
            Q_BIAS=student.bias_V is not None, Q_CAPPED=student.softcap is not None,
            P_BIAS=teacher.bias_V is not None, P_CAPPED=teacher.softcap is not None,
            LABELS=labels_C is not None, GRADS=grads, BLOCK=self.block,
            name=f"distill.heads {objective.loss}{self.options}", warps=self.warps, stages=STAGES,
        )  # fmt: skip

    def _buckets(
        self,
        teacher: Buckets,
        student_CV: Tensor,
        grads_CV: Tensor,
        rows: slice,
        labels_C: Tensor | None,
        losses_C: Tensor,
        grads: bool,
    ) -> None:
        known, student = teacher.indices_TK.shape[1], self.student
        launch(
            buckets_kernel, (len(losses_C),), student_CV, grads_CV, _or(self.biases[0], losses_C),
            teacher.indices_TK[rows].contiguous(), teacher.log_probs_TK[rows].contiguous(), teacher.log_tail_T[rows],
            _or(labels_C, losses_C), _or(self.share, losses_C), losses_C,
            student_CV.stride(0), grads_CV.stride(0), student_CV.shape[1], known,
            self.objective.temperature, student.scale, student.softcap or 1.0,
            BIAS=student.bias_V is not None, CAPPED=student.softcap is not None, LABELS=labels_C is not None,
            GRADS=grads, KNOWN=max(triton.next_power_of_2(known), 16), BLOCK=self.block,
            name=f"distill.buckets K={known}{self.options}", warps=self.warps, stages=STAGES,
        )  # fmt: skip


def _logits(hidden_CD: Tensor, head_VD: Tensor, out_CV: Tensor) -> None:
    """In float32, from factors of any dtype; a GPU does not round in between."""
    if hidden_CD.dtype == torch.float32:
        torch.mm(hidden_CD, head_VD.t(), out=out_CV)
    elif hidden_CD.is_cuda:
        torch.mm(hidden_CD, head_VD.t(), out_dtype=torch.float32, out=out_CV)
    else:
        torch.mm(hidden_CD.float(), head_VD.float().t(), out=out_CV)


def _or(pointer: Tensor | None, unread: Tensor) -> Tensor:
    """What stands for a pointer that the kernel is told not to read."""
    return unread if pointer is None else pointer


def shipped(arch: str, dtype: str) -> list[Shipped]:
    """A chunk of training with a frozen head: every loss, without options and with bias, soft caps and labels."""
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    # few enough for one chunk
    tokens, vocabulary, width = 512, 49152, 576
    hidden = torch.empty(tokens, width, dtype=kind, device="meta", requires_grad=True)
    head = torch.empty(vocabulary, width, dtype=kind, device="meta")
    log_probs = torch.empty(tokens, 256, device="meta")
    with recorded(arch) as kernels:
        for options in (False, True):
            student = Side(hidden, head, head[:, 0] if options else None, 1.0, 30.0 if options else None)
            labels = torch.empty(tokens, dtype=torch.int64, device="meta") if options else None
            for loss in DIVERGENCES:
                distill_triton(student, student, labels, Objective(loss, 2.0, 0.5, 1.0, None))
            for known in (64, 256):
                kept = log_probs[:, :known]
                topk_triton(
                    student, Buckets(kept.long(), kept, kept[:, 0]), labels, Objective("kl", 2.0, 0.5, 1.0, None)
                )
    return kernels
