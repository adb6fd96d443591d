"""Qwen3, and Qwen3-MoE, whose experts stay: an RMS norm of every query and key head before RoPE."""

from .spec import FamilySpec

QWEN3 = FamilySpec(model_types=("qwen3", "qwen3_moe"), query_norm="q_norm", key_norm="k_norm")
