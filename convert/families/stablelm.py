"""StableLM: LayerNorm, partial RoPE, and where the config asks a LayerNorm of each query and key head."""

from .spec import FamilySpec

STABLELM = FamilySpec(
    model_types=("stablelm",),
    query_norm="q_layernorm",
    key_norm="k_layernorm",
    biases=lambda config: (config.use_qkv_bias, False),
    eps="layer_norm_eps",
    fewer_heads=False,
)
