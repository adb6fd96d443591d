"""Gemma 2 and 3, text: norms that multiply by 1 + weight, before and after; windows in most layers; soft caps (2)."""

from .spec import FamilySpec

GEMMA2 = FamilySpec(model_types=("gemma2",), scale=lambda config: config.query_pre_attn_scalar**-0.5)
GEMMA3 = FamilySpec(
    model_types=("gemma3_text",),
    query_norm="q_norm",
    key_norm="k_norm",
    unit_offset=True,
    scale=lambda config: config.query_pre_attn_scalar**-0.5,
)
