"""Decode speed and cache bytes at a context length, with a synthetic cache: its content changes no timing."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

from ssmorph.convert.cache import MixerCacheLayer
from ssmorph.convert.families import attention_shape
from ssmorph.convert.mixers import Mixer


@torch.no_grad()
def decode_speed(model: Any, context: int, steps: int = 8) -> dict[str, float]:
    """Tokens per second of one-token steps after `context` tokens, batch 1, and the cache's bytes."""
    cache = filled_cache(model, context)
    token = torch.ones(1, 1, dtype=torch.long, device=model.device)

    def step() -> float:
        start = time.perf_counter()
        model(token, past_key_values=cache, use_cache=True)
        if model.device.type == "cuda":
            # kernels are only asked for when the call returns
            torch.cuda.synchronize(model.device)
        return time.perf_counter() - start

    step()
    times = [step() for _ in range(steps)]
    # the fastest step: a busy machine only ever adds time
    return {"context": context, "tokens_per_second": 1 / min(times), "cache_bytes": float(measure_bytes(cache))}


def filled_cache(model: Any, context: int) -> DynamicCache:
    """A cache as it is after `context` tokens: random keys, values and states of the right sizes."""
    config = model.config.get_text_config()
    shape = attention_shape(config)
    mixers: dict[int, Mixer] = model.mixers() if hasattr(model, "mixers") else {}
    cache = DynamicCache(config=config)
    generator = torch.Generator().manual_seed(0)
    for index in range(config.num_hidden_layers):
        if index in mixers:
            cache.layers[index] = mixers[index].synthetic_cache(context)
        else:
            size = (1, shape.kv_heads, context, shape.head_dim)
            keys, values = (
                torch.randn(size, generator=generator, dtype=model.dtype).to(model.device) for _ in range(2)
            )
            cache.update(keys, values, index)
    return cache


def measure_bytes(cache: DynamicCache) -> int:
    """Bytes of all tensors in the cache."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, MixerCacheLayer):
            tensors: list[torch.Tensor | None] = [*layer.tensors()]
        else:
            assert isinstance(layer, CacheLayerMixin)
            tensors = [layer.keys, layer.values]
        total += sum(t.numel() * t.element_size() for t in tensors if t is not None)
    return total
