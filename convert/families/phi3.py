"""Phi-3 and Phi-4-mini: q, k and v in one projection, a sliding window in every layer where the config has one."""

from .spec import FamilySpec

PHI3 = FamilySpec(
    model_types=("phi3",),
    fused="qkv_proj",
    biases=lambda config: (False, False),
    window=lambda config, layer: config.sliding_window,
)
