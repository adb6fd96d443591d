"""Qwen2 and Qwen2.5: biases on q, k and v, none on o; windows in the layers that `layer_types` names."""

from .spec import FamilySpec

QWEN2 = FamilySpec(
    model_types=("qwen2",),
    biases=lambda config: (True, False),
    stock_export="granitemoehybrid",
)
