"""The distillation losses in chunks of tokens, with the gradients computed in the forward pass and in place.

The teacher is frozen and the loss is a scalar, so the gradient of a chunk's logits is known as soon as they are, and
goes through the head at once: a few buffers of [chunk, V] are all that is ever held of the logits. With s = logits/tau:

    KL(p||q):  dL/ds = q - p        KL(q||p):  dL/ds = q (log q/p - KL)        JSD: (1-beta) q (log q/m - KL(q||m))

T tokens, C tokens of a chunk, V vocabulary, D and E widths of student and teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .objective import FLOOR, IGNORED, Objective


def distill_chunked(
    student_TD: Tensor,
    student_head_VD: Tensor,
    student_bias_V: Tensor | None,
    teacher_TE: Tensor,
    teacher_head_VE: Tensor,
    teacher_bias_V: Tensor | None,
    labels_T: Tensor | None,
    objective: Objective,
) -> Tensor:
    """The scalar loss."""
    teacher = (teacher_TE, teacher_head_VE, teacher_bias_V)
    grads = torch.is_grad_enabled()
    apply: Callable[..., Tensor] = _DistillLoss.apply
    return apply(student_TD, student_head_VD, student_bias_V, teacher, labels_T, objective, grads)


class _DistillLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, head, bias, teacher, labels, objective, grads):  # type: ignore[no-untyped-def]
        want = [grads and needed for needed in ctx.needs_input_grad[:3]]
        dhidden, dhead, dbias = (
            torch.zeros_like(t) if needed else None for t, needed in zip((student, head, bias), want, strict=True)
        )
        chunks = _Chunks(head.shape[0], min(objective.chunk, student.shape[0]), student, labels, objective, any(want))
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        for start in range(0, student.shape[0], objective.chunk):
            rows = slice(start, start + objective.chunk)
            hidden_CD = student[rows]
            loss, grad_CV = chunks.step((hidden_CD, head, bias), (teacher[0][rows], *teacher[1:]), rows)
            total += loss
            if dhidden is not None:
                torch.mm(grad_CV, head, out=dhidden[rows])
            if dhead is not None:
                dhead.addmm_(grad_CV.t(), hidden_CD)
            if dbias is not None:
                dbias += grad_CV.sum(0)
        ctx.save_for_backward(dhidden, dhead, dbias)
        return total.to(student.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return *(None if t is None else t * grad for t in ctx.saved_tensors), None, None, None, None


Side = tuple[Tensor, Tensor, Tensor | None]


class _Chunks:
    """The buffers of one chunk, and the loss and the gradient of the logits of each chunk put through them."""

    def __init__(
        self, vocabulary: int, tokens: int, student: Tensor, labels: Tensor | None, objective: Objective, want: bool
    ) -> None:
        self.objective, self.labels, self.want = objective, labels, want
        self.tokens = max(student.shape[0], 1)
        self.labelled = 1 if labels is None else max(int((labels != IGNORED).sum()), 1)
        extra = (objective.loss == "jsd") + (labels is not None) + (objective.student_softcap is not None)
        self.buffers = student.new_empty(3 + extra, tokens, vocabulary)

    def step(self, student: Side, teacher: Side, rows: slice) -> tuple[Tensor, Tensor]:
        """The chunk's share of the loss, and its gradient for h W^T + b (in a buffer, overwritten by the next step)."""
        objective, tau = self.objective, self.objective.temperature
        count = student[0].shape[0]
        q_CV, p_CV, *rest = self.buffers[:, :count]
        _logits(q_CV, student, objective.student_softcap)
        _logits(p_CV, teacher, objective.teacher_softcap)
        if objective.student_softcap is not None:
            slope_CV = torch.mul(q_CV, 1 / objective.student_softcap, out=rest.pop()).square_().neg_().add_(1)
        loss = q_CV.new_zeros((), dtype=torch.float64)
        if self.labels is not None:
            ce_CV = rest.pop()
            loss += self._cross_entropy(q_CV, self.labels[rows], ce_CV)
        for logits_CV in (q_CV, p_CV):
            logits_CV.mul_(1 / tau)
            logits_CV.sub_(torch.logsumexp(logits_CV, dim=-1, keepdim=True))
        divergence_C = self._divergence(q_CV, p_CV, rest)
        loss += divergence_C.double().sum() * (tau**2 / self.tokens)
        if self.want:
            q_CV.mul_(tau / self.tokens)
            if self.labels is not None:
                q_CV.add_(ce_CV)
            if objective.student_softcap is not None:
                q_CV.mul_(slope_CV)
        return loss, q_CV

    def _divergence(self, q_CV: Tensor, p_CV: Tensor, rest: list[Tensor]) -> Tensor:
        """Turns log q into dL/ds in place; p holds log p and is lost."""
        if self.objective.loss == "kl":
            return _kl(q_CV, p_CV, rest[0])
        if self.objective.loss == "reverse_kl":
            return _reverse_kl(q_CV, p_CV.clamp_(min=FLOOR), rest[0])
        return _jsd(q_CV, p_CV, rest[0], rest[1], self.objective.beta)

    def _cross_entropy(self, logits_CV: Tensor, labels_C: Tensor, grad_CV: Tensor) -> Tensor:
        """The weighted sum over labelled tokens; grad gets its gradient for the logits at temperature 1."""
        share = self.objective.ce_weight / self.labelled
        known_C1 = (labels_C != IGNORED)[:, None]
        index_C1 = labels_C[:, None].masked_fill(~known_C1, 0)
        log_sum_C1 = torch.logsumexp(logits_CV, dim=-1, keepdim=True)
        loss = (log_sum_C1 - logits_CV.gather(1, index_C1)).double().masked_fill(~known_C1, 0).sum() * share
        if self.want:
            weight_C1 = known_C1.to(logits_CV.dtype) * share
            torch.sub(logits_CV, log_sum_C1, out=grad_CV).exp_().mul_(weight_C1)
            grad_CV.scatter_add_(1, index_C1, -weight_C1)
        return loss


def _logits(out_CV: Tensor, side: Side, softcap: float | None) -> None:
    hidden_CD, head_VD, bias_V = side
    torch.mm(hidden_CD, head_VD.t(), out=out_CV)
    if bias_V is not None:
        out_CV.add_(bias_V)
    if softcap is not None:
        out_CV.mul_(1 / softcap).tanh_().mul_(softcap)


def _kl(q_CV: Tensor, p_CV: Tensor, work_CV: Tensor) -> Tensor:
    torch.exp(p_CV, out=work_CV)
    kl_C: Tensor = torch.linalg.vecdot(work_CV, p_CV.sub_(q_CV))
    q_CV.exp_().sub_(work_CV)
    return kl_C


def _reverse_kl(q_CV: Tensor, p_CV: Tensor, work_CV: Tensor) -> Tensor:
    torch.sub(q_CV, p_CV, out=work_CV)
    kl_C: Tensor = torch.linalg.vecdot(q_CV.exp_(), work_CV)
    q_CV.mul_(work_CV.sub_(kl_C[:, None]))
    return kl_C


def _jsd(q_CV: Tensor, p_CV: Tensor, m_CV: Tensor, work_CV: Tensor, beta: float) -> Tensor:
    torch.logaddexp(
        torch.add(p_CV, math.log(beta), out=m_CV), torch.add(q_CV, math.log1p(-beta), out=work_CV), out=m_CV
    )
    torch.exp(p_CV, out=work_CV)
    from_p_C: Tensor = torch.linalg.vecdot(work_CV, p_CV.sub_(m_CV))
    torch.sub(q_CV, m_CV, out=m_CV)
    from_q_C: Tensor = torch.linalg.vecdot(q_CV.exp_(), m_CV)
    q_CV.mul_(m_CV.sub_(from_q_C[:, None])).mul_(1 - beta)
    return beta * from_p_C + (1 - beta) * from_q_C
