"""GPT-NeoX and Pythia: q, k and v of each head in one projection, attention and MLP side by side, partial RoPE."""

from .spec import FamilySpec

GPT_NEOX = FamilySpec(
    model_types=("gpt_neox",),
    layers="gpt_neox.layers",
    mixer="attention",
    out="dense",
    fused="query_key_value",
    fused_order=lambda config: "groups",
    kv_heads=lambda config: config.num_attention_heads,
    eps="layer_norm_eps",
)
