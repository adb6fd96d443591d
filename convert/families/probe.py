"""A FamilySpec for an unknown decoder, found by name and shape in a tiny copy and checked by numbers on it.

The copy has the config's own class and switches, few layers, small sizes and random weights: no checkpoint is read.
What was found is used only if it makes the copy's attention, windows and logits again.
"""

from __future__ import annotations

import copy
import json
import logging
from typing import Any

import torch
from torch import nn

from ...errors import UserError, fail
from .probe_check import CheckError, checked
from .spec import FamilySpec, first_of

LOG = logging.getLogger(__name__)

QUERY, KEY, VALUE = ("q_proj", "query", "wq"), ("k_proj", "key", "wk"), ("v_proj", "value", "wv")
FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv")
OUT = ("o_proj", "out_proj", "dense", "wo", "c_proj")
QUERY_NORM = ("q_norm", "q_layernorm", "query_layernorm", "query_norm")
KEY_NORM = ("k_norm", "k_layernorm", "key_layernorm", "key_norm")
EPS = ("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "norm_eps", "layer_norm_epsilon")
NEEDED = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
# enough heads to show how they are laid out
HEADS = 4

_known: dict[str, FamilySpec] = {}


def probe(config: Any) -> FamilySpec:
    """The family of a config that FAMILIES does not list; the same for the same config.

    Raises:
        ValueError: a model in which something was not found, or of which a check failed.
    """
    content = json.dumps(config.to_dict(), sort_keys=True, default=str)
    if content not in _known:
        model = tiny_model(config)
        try:
            spec = _known[content] = checked(model, _found(model))
        except (CheckError, AttributeError, KeyError, RuntimeError, TypeError, UserError) as error:
            if isinstance(error, UserError) and "add-a-family" in str(error):
                raise
            raise unknown(config, _short(error)) from error
        names = spec.fused or f"{spec.query}, {spec.key}, {spec.value}"
        norms = f"{spec.query_norm} and {spec.key_norm}" if spec.query_norm else "no norms of q and k"
        LOG.warning(
            "family %s found by probing: layers %s, mixer %s, projections %s, out %s, %s",
            *(config.model_type, spec.layers, spec.mixer, names, spec.out, norms),
        )
    return _known[content]


def unknown(config: Any, lacks: str) -> UserError:
    """The error for a model type that is neither listed nor like what is."""
    do = "See docs/add-a-family.md."
    return fail("teacher.config.model_type", "must be a supported family", f"{config.model_type!r}: {lacks}", do)


def tiny_config(config: Any) -> Any:
    """A copy of a config with every switch as it is, and small sizes where their keys have the usual names."""
    lacks = [name for name in NEEDED if first_of(config, name) is None]
    if lacks:
        raise unknown(config, f"its config lacks {', '.join(lacks)}")
    heads, kv_heads = config.num_attention_heads, first_of(config, "num_key_value_heads")
    ratio = heads // kv_heads if kv_heads else 1
    small: dict[str, Any] = {"num_attention_heads": HEADS, "hidden_size": 16 * HEADS, "vocab_size": 64}
    small |= {"num_hidden_layers": min(4, config.num_hidden_layers), "intermediate_size": 96}
    if kv_heads:
        small["num_key_value_heads"] = HEADS if ratio == 1 else 1 if kv_heads == 1 else 2
    if first_of(config, "head_dim") is not None:
        # a head width that is not D / H stays one
        small["head_dim"] = 16 if config.head_dim * heads == config.hidden_size else 24
    if first_of(config, "sliding_window") is not None:
        small["sliding_window"] = 7
    if first_of(config, "layer_types") is not None:
        small["layer_types"] = _layer_types(config, small["num_hidden_layers"])
    own = copy.deepcopy(config)
    for name, value in small.items():
        if hasattr(own, name):
            setattr(own, name, value)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(own, name, None)
    return own


def _layer_types(config: Any, count: int) -> list[str]:
    """The first kinds of layers; the last of them replaced where they would leave one out."""
    kinds = list(config.layer_types[:count])
    for kind in sorted(set(config.layer_types) - set(kinds)):
        kinds[-1] = kind
    return kinds


def tiny_model(config: Any) -> Any:
    """The random copy that is examined."""
    from transformers import AutoModelForCausalLM

    from ..tiny import strengthen

    own = tiny_config(config)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(own, dtype=torch.float32)
    except (ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:
        raise unknown(config, f"no small copy of it can be made ({_short(error)})") from error
    strengthen(model)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        # norms that all multiply alike would hide which of them there are
        if parameter.dim() == 1 and name.endswith("weight"):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval().requires_grad_(False)


def _found(model: Any) -> FamilySpec:
    """The spec that names and shapes suggest."""
    config = model.config
    count = config.num_hidden_layers
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    for path, layers in lists:
        mixers = [(n, m) for n, m in layers[0].named_children() if _projections(m) is not None]
        if len(mixers) == 1:
            name, mixer = mixers[0]
            return _spec_of(config, path, name, mixer)
    if not lists:
        raise unknown(config, f"no list of {count} decoder layers was found")
    raise unknown(config, "no attention with q, k, v and output projections was found in a layer")


def _projections(mixer: nn.Module) -> dict[str, str] | None:
    """The names of an attention's projections, as the spec calls them; None where it is none."""
    fused, out = _child(mixer, FUSED, nn.Linear), _child(mixer, OUT, nn.Linear)
    parts = {word: _child(mixer, n, nn.Linear) for word, n in (("query", QUERY), ("key", KEY), ("value", VALUE))}
    found = {"fused": fused} if fused else parts
    if out is None or None in found.values():
        return None
    return {word: str(name) for word, name in found.items()} | {"out": out}


def _spec_of(config: Any, layers: str, name: str, mixer: nn.Module) -> FamilySpec:
    eps = next((n for n in EPS if first_of(config, n) is not None), None)
    if eps is None:
        raise unknown(config, f"its config has none of {', '.join(EPS)}")
    names = _projections(mixer)
    assert names is not None
    first, out = (mixer.get_submodule(names[word]) for word in ("fused" if "fused" in names else "query", "out"))
    biases = getattr(first, "bias", None) is not None, getattr(out, "bias", None) is not None
    return FamilySpec(
        model_types=(config.model_type,),
        layers=layers,
        mixer=name,
        query_norm=_child(mixer, QUERY_NORM, nn.Module),
        key_norm=_child(mixer, KEY_NORM, nn.Module),
        biases=lambda _config: biases,
        eps=eps,
        # not among what the probe checks
        fewer_heads=False,
        **names,  # type: ignore[arg-type]
    )


def _child(module: nn.Module, names: tuple[str, ...], kind: type[nn.Module]) -> str | None:
    children = dict(module.named_children())
    return next((name for name in names if isinstance(children.get(name), kind)), None)


def _short(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120].rstrip(".")
