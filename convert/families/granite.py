"""Granite: Llama with multipliers of embeddings, residuals, attention scores and logits."""

from .spec import FamilySpec

GRANITE = FamilySpec(
    model_types=("granite",),
    scale=lambda config: config.attention_multiplier,
    logits=lambda config: (1 / config.logits_scaling, None),
    stock_export="granitemoehybrid",
)
