"""Phi-1, Phi-1.5 and Phi-2: attention and MLP side by side, LayerNorm, partial RoPE, biases everywhere."""

from .spec import FamilySpec

PHI = FamilySpec(
    model_types=("phi",),
    out="dense",
    query_norm="q_layernorm",
    key_norm="k_layernorm",
    biases=lambda config: (True, True),
    eps="layer_norm_eps",
)
