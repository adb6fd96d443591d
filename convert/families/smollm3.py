"""SmolLM3: every fourth layer without RoPE."""

from .spec import FamilySpec, rotary_share

SMOLLM3 = FamilySpec(
    model_types=("smollm3",),
    # an entry of 1 means that the layer does use RoPE
    rotary=lambda config, layer: rotary_share(config, layer) if config.no_rope_layers[layer] else 0.0,
)
