"""What a conversion would do and cost, from the recipe and the teacher's config: no weights are read.

Time is estimated from a matrix product measured here and the floating-point operations of each stage.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ssmorph.convert.families import AttentionShape, attention_shape, family_of
from ssmorph.convert.plan import attention_parameters, cache_bytes, kv_bytes_per_token, mixer_parameters, resolve_layers
from ssmorph.convert.surgery import faithful_shape
from ssmorph.convert.teachers import load_config
from ssmorph.convert.treatment import name_layers, treatments

from .config import CalibrateStage, LogitsStage, RunConfig, SurgeryStage, TrainStage

FLOAT32 = 4


def plan_of(config: RunConfig) -> dict[str, Any]:
    """Layer table, parameters, bytes of cache, crossover length, what is kept and lost, time and memory; plain values.

    `cache_tokens` is where a layer's cache stops growing, its sliding window; None for never. `never_smaller` are the
    converted layers whose attention had a window so short that its cache stays below the mixer's.

    Raises:
        ValueError: an unsupported family, head counts that do not divide, a layer out of range.
    """
    teacher = load_config(config.teacher.source, config.teacher.revision, config.teacher.trust_remote_code)
    spec, attention = family_of(teacher), attention_shape(teacher)
    layers = resolve_layers(config.student.layers, attention.layers)
    shape = faithful_shape(attention, config.student.conv_kernel)
    kept = attention_parameters(
        attention.hidden,
        attention.heads,
        attention.kv_heads,
        attention.head_dim,
        attention.qkv_bias,
        attention.out_bias,
    )
    made = mixer_parameters(config.student.mixer, shape)
    per_token, fixed = kv_bytes_per_token(attention, FLOAT32), cache_bytes(shape, FLOAT32)
    init = config.stages[0].init if isinstance(config.stages[0], SurgeryStage) else "copy"
    table = []
    for i in range(attention.layers):
        converted = i in layers
        row: dict[str, Any] = {"layer": i, "becomes": config.student.mixer if converted else "attention (kept)"}
        row |= {"parameters": made if converted else kept, "cache_bytes_per_token": 0 if converted else per_token}
        row |= {"cache_tokens": None if converted else spec.window(teacher, i)}
        table.append(row | {"cache_bytes_fixed": fixed if converted else 0})
    crossover = math.ceil(fixed / per_token)
    return {
        "teacher": config.teacher.source,
        "family": teacher.model_type,
        "layers": table,
        "converted": list(layers),
        "parameters_added": len(layers) * (made - kept),
        "smaller_from_tokens": crossover,
        "never_smaller": [i for i in layers if (spec.window(teacher, i) or crossover) < crossover],
        "treatment": [row._asdict() for row in treatments(spec, teacher, layers, config.student.mixer, init)],
        "stock_export_fits": spec.stock_export(teacher) if config.student.mixer == "mamba2" else None,
        "estimate": _estimate(config, teacher, attention, len(layers), made, kept),
    }


def _estimate(
    config: RunConfig, teacher: Any, attention: AttentionShape, converted: int, made: int, kept: int
) -> dict[str, Any]:
    width = attention.hidden
    mlp = 3 * width * getattr(teacher, "intermediate_size", 4 * width)
    body = attention.layers * (kept + mlp)
    head = teacher.vocab_size * width
    aligned = 2 * body + 6 * converted * made
    flops = {"calibrate": 4.5 * body, "mixing": aligned, "hidden": aligned, "logits": 8 * body + 8 * head}
    speed = _matmul_speed()
    stages = {}
    for name, stage in zip(config.stage_names(), config.stages, strict=True):
        tokens = stage.tokens if isinstance(stage, (CalibrateStage, TrainStage)) else 0
        stages[name] = {"tokens": tokens, "minutes": round(tokens * flops.get(stage.kind, 0) / speed / 60, 1)}
    parameters = body + head + converted * (made - kept)
    trained = converted * made
    # weights, gradients and AdamW's two moments of what is trained
    held = body + head + 4 * trained + _activations(config, attention.layers, width)
    if any(isinstance(stage, TrainStage) and stage.optim.rest_lr for stage in config.stages):
        held += 4 * (parameters - trained)
    return {
        "stages": stages,
        "minutes": round(sum(s["minutes"] for s in stages.values()), 1),
        "matmul_gflops": round(speed / 1e9, 1),
        "parameters": parameters,
        "memory_gib": round(FLOAT32 * held / 2**30, 1),
    }


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


def print_plan(plan: dict[str, Any]) -> None:
    """The plan on the terminal: a table of the layers, one of what becomes of the teacher's features, the estimate."""
    console = Console()
    table = Table(title=f"{plan['teacher']} ({plan['family']}), cache in float32")
    for column in ("layer", "becomes", "parameters", "cache per token", "cache fixed"):
        table.add_column(column, justify="left" if column == "becomes" else "right")
    for row in plan["layers"]:
        window = f" up to {row['cache_tokens']:,}" if row["cache_tokens"] is not None else ""
        per_token = f"{row['cache_bytes_per_token']:,} B{window}"
        cells = [str(row["layer"]), row["becomes"], f"{row['parameters']:,}", per_token]
        table.add_row(*cells, f"{row['cache_bytes_fixed']:,} B")
    console.print(table)
    console.print(f"{len(plan['converted'])} layers converted, {plan['parameters_added']:+,} parameters.")
    console.print(
        f"From {plan['smaller_from_tokens']} tokens of context on, a converted layer's cache is the smaller one."
    )
    if plan["never_smaller"]:
        console.print(
            f"Not in {name_layers(plan['never_smaller'])}: the sliding window keeps attention's cache smaller."
        )
    features = Table("feature", "is", "how", title="What becomes of the teacher")
    for row in plan["treatment"]:
        features.add_row(row["feature"], row["treatment"], row["note"])
    console.print(features)
    console.print(
        f"Stock architecture it would fit: {plan['stock_export_fits'] or 'none'} (export itself is not built yet)."
    )
    estimate = plan["estimate"]
    for name, stage in estimate["stages"].items():
        console.print(f"  {name:14} {stage['tokens']:>9,} tokens  about {stage['minutes']} min here")
    console.print(
        f"About {estimate['minutes']} min on the CPU here ({estimate['matmul_gflops']} GFLOP/s)"
        f" and {estimate['memory_gib']} GiB in float32."
    )
