"""OLMo 2: norms after attention and MLP instead of before, and an RMS norm over all queries and all keys."""

from .spec import FamilySpec

OLMO2 = FamilySpec(
    model_types=("olmo2",),
    mixer_norm=lambda config: None,
    query_norm="q_norm",
    key_norm="k_norm",
    fewer_heads=False,
)
