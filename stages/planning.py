"""What a conversion would do and cost, from the recipe and the teacher's config: no weights are read.

The operations of each stage are counted. Minutes are told for the CPU alone, from a matrix product measured here.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from ssmorph.convert.counts import TeacherCounts, head_parameters, mixer_parameters, teacher_counts
from ssmorph.convert.export.granite import obstacles
from ssmorph.convert.families import attention_shape, family_of
from ssmorph.convert.mixers import MixerShape
from ssmorph.convert.plan import cache_bytes, kept_bytes_per_token, kv_bytes_per_token, retrieval_count, strategy_of
from ssmorph.convert.surgery import MixerChoice, require_attention_function, shape_of
from ssmorph.convert.teachers import load_config
from ssmorph.convert.treatment import treatments

from .config import CALIBRATION_BATCH, SELF, CalibrateStage, LogitsStage, RunConfig, SurgeryStage, TrainStage
from .kept_heads import heads_before_probe
from .placement import converted_before_scores

FLOAT32 = 4


def plan_of(config: RunConfig) -> dict[str, Any]:
    """Layer table, parameters, bytes of cache, crossover length, what is kept and lost, cost; plain values.

    `cache_tokens` is where a layer's cache stops growing, its sliding window; None for never. `never_smaller` are the
    converted layers whose attention had a window so short that its cache stays below the mixer's. `placement` is a
    strategy that scores layers, whose choice only the run can tell: the table then has as many, spread evenly, or with
    a budget of bytes as if all scores were equal. `heads` is the same for kept heads; None where a list names them.

    Raises:
        ValueError: an unsupported family, head counts that do not divide, a layer out of range.
    """
    teacher = load_config(config.teacher.source, config.teacher.revision, config.teacher.trust_remote_code)
    spec, attention = family_of(teacher), attention_shape(teacher)
    layers, strategy = converted_before_scores(config, spec, teacher), strategy_of(config.student.layers)
    student = config.student
    require_attention_function(spec, teacher, student.mixer)
    heads = heads_before_probe(config, layers, attention)
    choice = MixerChoice(kind=student.mixer, conv_kernel=student.conv_kernel, window=student.window,
                         sinks=student.sinks, state=student.state, kept=heads)  # fmt: skip
    choices = [choice.at(i) for i in range(attention.layers)]
    shapes = [shape_of(attention, own) for own in choices]
    counts = teacher_counts(teacher, spec, config.teacher.trust_remote_code)
    parts = zip(choices, shapes, counts.attention, strict=True)
    head = head_parameters(spec, teacher)
    made = [mixer_parameters(own.kind, shape, kept, head) for own, shape, kept in parts]
    per_token = kv_bytes_per_token(attention, FLOAT32)
    init = config.stages[0].init if isinstance(config.stages[0], SurgeryStage) else "copy"
    table = []
    for i, kept in enumerate(counts.attention):
        converted = i in layers
        grows = kept_bytes_per_token(shapes[i], FLOAT32) if converted else per_token
        row: dict[str, Any] = {"layer": i, "becomes": choices[i].kind if converted else "attention (kept)"}
        row |= {"kept_heads": list(shapes[i].kept) if converted else list(range(attention.heads))}
        row |= {"parameters": made[i] if converted else kept, "cache_bytes_per_token": grows}
        row |= {"cache_tokens": spec.window(teacher, i) if grows else None}
        table.append(row | {"cache_bytes_fixed": cache_bytes(shapes[i], FLOAT32) if converted else 0})
    crossovers = [_crossover(shape, per_token) for shape in shapes]
    added = sum(made[i] - counts.attention[i] for i in layers)
    return {
        "teacher": config.teacher.source,
        "family": teacher.model_type,
        "layers": table,
        "converted": list(layers),
        "heads": None if retrieval_count(student.heads) is None else student.heads,
        "placement": config.student.layers if strategy is not None and strategy.scored else None,
        "teacher_parameters": counts.total,
        "parameters": counts.total + added,
        "parameters_added": added,
        "smaller_from_tokens": max((c for i in layers if (c := crossovers[i]) is not None), default=crossovers[0]),
        "never_smaller": [i for i in layers if _never_smaller(crossovers[i], spec.window(teacher, i))],
        "treatment": [
            row._asdict() for row in treatments(spec, teacher, layers, config.student.mixer, init, bool(heads))
        ],
        "stock_export": spec.stock_export,
        "stock_export_obstacles": obstacles(teacher, spec, {i: (choices[i].kind, shapes[i]) for i in layers}),
        "estimate": _estimate(config, counts, sum(made[i] for i in layers), added, attention.hidden),
    }


def _crossover(shape: MixerShape, per_token: int) -> int | None:
    """Tokens from which a mixer's cache is no larger than that of attention; None where it never is."""
    saved = per_token - kept_bytes_per_token(shape, FLOAT32)
    return math.ceil(cache_bytes(shape, FLOAT32) / saved) if saved else None


def _never_smaller(crossover: int | None, window: int | None) -> bool:
    return crossover is None or (window is not None and window < crossover)


def _estimate(config: RunConfig, counts: TeacherCounts, trained: int, added: int, width: int) -> dict[str, Any]:
    """Operations, minutes on a CPU, and memory; `trained` are the mixers' parameters, `added` what they add."""
    body = counts.active
    aligned = 2 * body + 6 * trained
    per_token = {"calibrate": 4.5 * body, "mixing": aligned, "hidden": aligned}
    beside = {i: _beside(s, counts) for i, s in enumerate(config.stages) if isinstance(s, LogitsStage)}
    # a card that is not at hand cannot be measured, and a CPU's minutes say nothing of it
    speed = _matmul_speed() if config.device == "cpu" else None
    stages, total = {}, 0.0
    for index, (name, stage) in enumerate(zip(config.stage_names(), config.stages, strict=True)):
        tokens = stage.tokens if isinstance(stage, (CalibrateStage, TrainStage)) else 0
        each = per_token.get(stage.kind, 0.0)
        if index in beside:
            each = 6 * (body + counts.head) + sum(2 * (c.active + c.head) for c in beside[index])
        operations = tokens * each
        if isinstance(stage, CalibrateStage):
            operations += 6 * trained * stage.refine_steps * CALIBRATION_BATCH * config.data.window
        stages[name] = {"tokens": tokens, "pflop": _digits(operations / 1e15), "minutes": _minutes(operations, speed)}
        total += operations
    # the student shares what it does not replace; weights, gradients and AdamW's two moments of what is trained
    held = counts.total + 4 * trained + _activations(config, len(counts.attention), width)
    held += max((sum(c.total for c in each if c is not counts) for each in beside.values()), default=0)
    if any(isinstance(stage, TrainStage) and stage.optim.rest_lr for stage in config.stages):
        held += 4 * (counts.total + added - trained)
    return {
        "device": config.device,
        "stages": stages,
        "pflop": _digits(total / 1e15),
        "minutes": _minutes(total, speed),
        "matmul_gflops": None if speed is None else round(speed / 1e9, 1),
        "memory_gib": round(FLOAT32 * held / 2**30, 1),
    }


def _beside(stage: LogitsStage, own: TeacherCounts) -> list[TeacherCounts]:
    """What runs beside the student in a logits stage."""
    found = []
    for t in stage.teachers if stage.offline is None else ():
        if t.source == SELF:
            found.append(own)
            continue
        config = load_config(t.source, t.revision, t.trust_remote_code)
        found.append(teacher_counts(config, family_of(config), t.trust_remote_code))
    return found


def _minutes(operations: float, speed: float | None) -> float | None:
    return None if speed is None else round(operations / speed / 60, 1)


def _digits(value: float) -> float:
    return float(f"{value:.3g}")


def _activations(config: RunConfig, layers: int, width: int) -> int:
    """Numbers that the largest stage holds besides weights: calibration all its tokens, training what goes backward."""
    tokens = [0]
    for stage in config.stages:
        if isinstance(stage, CalibrateStage):
            # hidden states of both models, before and after a layer, and the inputs, heads and outputs of its attention
            tokens.append(7 * stage.tokens)
        elif isinstance(stage, TrainStage):
            # about 30 widths a layer; checkpoints hold its input alone; a window more for the teacher's pass
            checkpointed = isinstance(stage, LogitsStage) and stage.gradient_checkpointing
            held = layers + 30 if checkpointed else 30 * layers
            tokens.append((stage.batch + 1) * config.data.window * held)
    return max(tokens) * width


def _matmul_speed() -> float:
    """Floating-point operations per second of a matrix product of this model's kind, with torch's current threads."""
    a, b = torch.randn(1024, 576), torch.randn(576, 1536)
    best = math.inf
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    # the rest of a layer runs slower than its products
    return 0.6 * 2 * a.numel() * b.shape[1] / best
