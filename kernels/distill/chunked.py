"""The distillation losses in chunks of tokens: the gradients of the logits are written over the logits.

Two buffers [chunk, V] hold a chunk's logits (one, where the teacher comes in buckets; three for several teachers). All
else is done a few rows at a time, which stay in the cache. With s = logits / tau, lse a log-sum-exp and sums over the
vocabulary:

    KL(p||q) = sum p (log p - log q)     dL/ds = q - p
    KL(q||p)                             dL/ds = q (log q/p - KL)
    JSD                                  dL/ds = (1 - beta) q (log q/m - KL(q||m))
    buckets                              dL/ds = q - p at known tokens, q (1 - p_tail / q_tail) at the others

T tokens, C tokens of a chunk, R tokens in the cache, K kept tokens of the teacher, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .driver import through_head
from .objective import (
    FLOOR,
    IGNORED,
    NEVER,
    Buckets,
    Ensemble,
    Objective,
    Side,
    chunk_rows,
    cross_entropy_share,
)

# bytes of all chunk buffers, the least rows for a fast matmul, bytes of a buffer that stays in the cache
BUDGET, LEAST_ROWS, CACHED = 48 << 20, 32, 1 << 19
# buffers in the cache that a divergence needs beside the logits
WORK = {"kl": 1, "reverse_kl": 1, "jsd": 3}


def distill_chunked(student: Side, teacher: Side | Ensemble, labels_T: Tensor | None, objective: Objective) -> Tensor:
    """The scalar loss."""
    return _loss(student, teacher, labels_T, objective)


def topk_chunked(student: Side, teacher: Buckets, labels_T: Tensor | None, objective: Objective) -> Tensor:
    """The scalar loss."""
    return _loss(student, teacher, labels_T, objective)


def topk_of_chunked(teacher: Side | Ensemble, count: int, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """(indices [T, K], their log-probabilities, the log-probability of all others [T])."""
    teacher = teacher.prepared(torch.promote_types(teacher.dtype, torch.float32))
    first = teacher.sides[0] if isinstance(teacher, Ensemble) else teacher
    (tokens, _), vocabulary = first.hidden_TD.shape, first.head_VD.shape[0]
    most = objective.chunk or max(BUDGET // (2 * vocabulary * first.head_VD.element_size()), LEAST_ROWS)
    buffers = first.hidden_TD.new_empty(2, chunk_rows(tokens, most), vocabulary)
    indices_TK = torch.empty(tokens, count, dtype=torch.int64, device=buffers.device)
    log_probs_TK, log_rest_T = buffers.new_empty(tokens, count), buffers.new_empty(tokens)
    for start in range(0, tokens, buffers.shape[1]):
        rows = slice(start, min(start + buffers.shape[1], tokens))
        logits_CV, spare_CV = buffers[:, : rows.stop - start]
        _teacher_logits(teacher, rows, logits_CV, spare_CV)
        if isinstance(teacher, Side):
            teacher.finish_(logits_CV)
        kept = _largest(logits_CV.mul_(1 / objective.temperature), count)
        indices_TK[rows], log_probs_TK[rows], log_rest_T[rows] = kept
    return indices_TK, log_probs_TK, log_rest_T


def _largest(s_CV: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `topk_of_chunked`; the logits are lost. The rest is summed itself: where it is small, 1 - sum is rounding."""
    log_sum_C1 = s_CV.logsumexp(-1, keepdim=True)
    known_CK, indices_CK = s_CV.topk(count, dim=-1)
    rest_C1 = s_CV.scatter_(1, indices_CK, -torch.inf).logsumexp(-1, keepdim=True)
    # rounding must not make it more than all
    return indices_CK, known_CK - log_sum_C1, (rest_C1 - log_sum_C1)[:, 0].clamp(max=0)


def _loss(student: Side, teacher: Side | Ensemble | Buckets, labels_T: Tensor | None, objective: Objective) -> Tensor:
    dtype = torch.promote_types(student.dtype, torch.float32)
    student = student.prepared(dtype)
    if not isinstance(teacher, Buckets):
        with torch.no_grad():
            teacher = teacher.prepared(dtype)
    chunks = _Chunks(student, teacher, labels_T, objective)
    return through_head(student.hidden_TD, student.head_VD, student.bias_V, chunks)


class _Chunks:
    """See `driver.Chunks`."""

    def __init__(
        self, student: Side, teacher: Side | Ensemble | Buckets, labels_T: Tensor | None, objective: Objective
    ) -> None:
        self.student, self.teacher, self.labels_T, self.objective = student, teacher, labels_T, objective
        self.ce_share = cross_entropy_share(labels_T, objective)
        tokens, vocabulary = student.hidden_TD.shape[0], student.head_VD.shape[0]
        row = vocabulary * student.head_VD.element_size()
        buffers = {Buckets: 1, Side: 2, Ensemble: 3}[type(teacher)]
        most = objective.chunk or max(BUDGET // (buffers * row), LEAST_ROWS)
        self.rows = chunk_rows(tokens, most)
        self.logits = student.hidden_TD.new_empty(buffers, self.rows, vocabulary)
        own = 0 if isinstance(teacher, Buckets) else WORK[objective.loss]
        work = own + (labels_T is not None) + (student.softcap is not None)
        self.work = student.hidden_TD.new_empty(work, max(min(CACHED // row, self.rows), 1), vocabulary)

    def step(self, hidden_CD: Tensor, rows: slice, losses_C: Tensor, grads: bool) -> Tensor:
        count, cached = hidden_CD.shape[0], self.work.shape[1]
        logits = self.logits[:, :count]
        torch.mm(hidden_CD, self.student.head_VD.t(), out=logits[0])
        if not isinstance(self.teacher, Buckets):
            _teacher_logits(self.teacher, rows, logits[1], logits[2] if len(logits) > 2 else None)
        for start in range(0, count, cached):
            part = slice(start, min(start + cached, count))
            tokens = slice(rows.start + part.start, rows.start + part.stop)
            self._part(logits[:, part], tokens, losses_C[part], grads)
        return logits[0]

    def _part(self, logits: Tensor, tokens: slice, losses_R: Tensor, grads: bool) -> None:
        """Losses of tokens in the cache, and the gradients over the student's logits."""
        tau, softcap = self.objective.temperature, self.student.softcap
        q_RV, *work = logits[0], *self.work[:, : logits.shape[1]]
        self.student.finish_(q_RV)
        if softcap is not None:
            slope_RV = torch.mul(q_RV, 1 / softcap, out=work.pop()).square_().neg_().add_(1)
        if self.labels_T is not None and self.ce_share is not None:
            ce_RV = work.pop()
            ce_R = _cross_entropy(q_RV, self.labels_T[tokens], self.ce_share, ce_RV)
        q_RV.mul_(1 / tau)
        torch.mul(self._divergence(logits, tokens, work), tau**2, out=losses_R)
        if self.labels_T is not None:
            losses_R += ce_R
        if grads:
            if tau != 1:
                q_RV.mul_(tau)
            if self.labels_T is not None:
                q_RV.add_(ce_RV)
            if softcap is not None:
                q_RV.mul_(slope_RV)

    def _divergence(self, logits: Tensor, tokens: slice, work: list[Tensor]) -> Tensor:
        """The divergences of tokens; turns the student's logits into dL/ds. The teacher's are lost."""
        if isinstance(self.teacher, Buckets):
            buckets = (self.teacher.indices_TK, self.teacher.log_probs_TK, self.teacher.log_tail_T)
            return _buckets(logits[0], *(t[tokens] for t in buckets))
        q_RV, p_RV = logits[:2]
        if isinstance(self.teacher, Side):
            self.teacher.finish_(p_RV)
        p_RV.mul_(1 / self.objective.temperature)
        if self.objective.loss == "kl":
            return _kl(q_RV, p_RV, *work)
        if self.objective.loss == "reverse_kl":
            return _reverse_kl(q_RV, p_RV, *work)
        return _jsd(self.objective.beta, q_RV, p_RV, *work)


def _teacher_logits(teacher: Side | Ensemble, rows: slice, out_CV: Tensor, spare_CV: Tensor | None) -> None:
    """Writes h W^T of some tokens; for several teachers, with a second buffer, the mean of finished logits."""

    def product(side: Side, each_CV: Tensor) -> None:
        torch.mm(side.hidden_TD[rows], side.head_VD.t(), out=each_CV)

    if isinstance(teacher, Side):
        product(teacher, out_CV)
    else:
        assert spare_CV is not None
        teacher.mean(product, out_CV, spare_CV)


def _cross_entropy(logits_RV: Tensor, labels_R: Tensor, share: Tensor, grad_RV: Tensor) -> Tensor:
    """The weighted cross-entropy of tokens; grad gets its gradient for the logits."""
    known_R1 = (labels_R != IGNORED)[:, None]
    index_R1 = labels_R[:, None].masked_fill(~known_R1, 0)
    weight_R1 = known_R1 * share.to(logits_RV.dtype)
    log_sum_R1 = _softmax(logits_RV, grad_RV)
    loss_R1 = (log_sum_R1 - logits_RV.gather(1, index_R1)) * weight_R1
    grad_RV.mul_(weight_R1).scatter_add_(1, index_R1, -weight_R1)
    return loss_R1[:, 0]


def _softmax(s_RV: Tensor, out_RV: Tensor) -> Tensor:
    """Writes the softmax of each row; returns its log-sum-exp."""
    peak_R1 = s_RV.amax(-1, keepdim=True)
    sum_R1 = torch.sub(s_RV, peak_R1, out=out_RV).exp_().sum(-1, keepdim=True)
    out_RV.mul_(1 / sum_R1)
    return peak_R1 + sum_R1.log()


def _kl(q_RV: Tensor, p_RV: Tensor, work_RV: Tensor) -> Tensor:
    q_RV.sub_(q_RV.amax(-1, keepdim=True))
    p_RV.sub_(p_RV.amax(-1, keepdim=True))
    torch.sub(p_RV, q_RV, out=work_RV)
    sum_q_R1, sum_p_R1 = (t.exp_().sum(-1, keepdim=True) for t in (q_RV, p_RV))
    p_RV.mul_(1 / sum_p_R1)
    kl_R: Tensor = torch.linalg.vecdot(p_RV, work_RV)
    q_RV.mul_(1 / sum_q_R1).sub_(p_RV)
    return kl_R + (sum_q_R1.log() - sum_p_R1.log())[:, 0]


def _reverse_kl(q_RV: Tensor, p_RV: Tensor, work_RV: Tensor) -> Tensor:
    p_RV.sub_(_softmax(p_RV, work_RV)).clamp_(min=FLOOR)
    log_sum_R1 = _softmax(q_RV, work_RV)
    q_RV.sub_(log_sum_R1).sub_(p_RV)
    kl_R: Tensor = torch.linalg.vecdot(work_RV, q_RV)
    q_RV.sub_(kl_R[:, None]).mul_(work_RV)
    return kl_R


def _jsd(beta: float, log_q_RV: Tensor, log_p_RV: Tensor, q_RV: Tensor, p_RV: Tensor, log_m_RV: Tensor) -> Tensor:
    log_q_RV.sub_(_softmax(log_q_RV, q_RV))
    log_p_RV.sub_(_softmax(log_p_RV, p_RV))
    # where both probabilities underflow they weigh nothing, and the floor keeps 0 times the logarithm 0
    torch.mul(p_RV, beta, out=log_m_RV).add_(q_RV, alpha=1 - beta)
    log_m_RV.clamp_(min=torch.finfo(log_m_RV.dtype).tiny).log_()
    from_p_R: Tensor = torch.linalg.vecdot(p_RV, log_p_RV.sub_(log_m_RV))
    from_q_R: Tensor = torch.linalg.vecdot(q_RV, log_q_RV.sub_(log_m_RV))
    log_q_RV.sub_(from_q_R[:, None]).mul_(q_RV).mul_(1 - beta)
    return beta * from_p_R + (1 - beta) * from_q_R


def _buckets(s_RV: Tensor, indices_RK: Tensor, log_p_RK: Tensor, log_tail_R: Tensor) -> Tensor:
    known_RK = s_RV.gather(1, indices_RK)
    s_RV.scatter_(1, indices_RK, -torch.inf)
    # finite where no token is left, and then the sum is 0
    peak_R1 = s_RV.amax(-1, keepdim=True).clamp(min=torch.finfo(s_RV.dtype).min)
    sum_R1 = s_RV.sub_(peak_R1).exp_().sum(-1, keepdim=True)
    log_rest_R1 = peak_R1 + sum_R1.log()
    log_all_R1 = torch.logaddexp(known_RK.logsumexp(-1, keepdim=True), log_rest_R1)
    log_q_RK, log_q_tail_R = known_RK - log_all_R1, (log_rest_R1 - log_all_R1)[:, 0]
    p_RK, tail_R = log_p_RK.exp(), log_tail_R.exp()
    share_R1 = (log_q_tail_R.exp() - tail_R)[:, None] / sum_R1
    s_RV.mul_(share_R1.masked_fill(sum_R1 == 0, 0)).scatter_(1, indices_RK, log_q_RK.exp() - p_RK)
    return torch.linalg.vecdot(p_RK, log_p_RK - log_q_RK) + tail_R * (log_tail_R - log_q_tail_R.clamp(min=NEVER))
