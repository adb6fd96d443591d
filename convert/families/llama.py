"""Llama and what shares its architecture: SmolLM, SmolLM2, TinyLlama, Vicuna, Llama 3 with scaled RoPE."""

from .spec import FamilySpec

LLAMA = FamilySpec(model_types=("llama",), stock_export="granitemoehybrid")
