"""Mistral, and Mixtral, whose experts stay: sliding windows in every layer where the config has one."""

from .spec import FamilySpec

MISTRAL = FamilySpec(
    model_types=("mistral", "mixtral"),
    biases=lambda config: (False, False),
    window=lambda config, layer: config.sliding_window,
    stock_export="granitemoehybrid",
)
