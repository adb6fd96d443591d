"""A hybrid of stock Mamba-2 layers as GraniteMoeHybrid without experts, an architecture that other software has.

Such a decoder is Llama's with multipliers, gate and up projection in one, and Mamba-2 in the layers that its config
names: nothing is approximated, tensors are renamed and joined. Its group norm is one per head since transformers 5.23;
before, and in mlx-lm 0.32, it spans all heads, which is another function.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from ..families import FamilySpec, family_of
from ..mixers import MixerShape
from ..mixers.mamba2 import Mamba2Mixer

if TYPE_CHECKING:
    from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

NAME = "granitemoehybrid"
# what both configs call by one name
SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "pad_token_id", "bos_token_id",
    "eos_token_id", "tie_word_embeddings", "attention_dropout",
)  # fmt: skip
# Granite's own, 1 in other families
MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")


def obstacles(config: Any, spec: FamilySpec, layers: Mapping[int, tuple[str, MixerShape]]) -> list[str]:
    """Why a hybrid is no GraniteMoeHybrid; empty where it is one.

    Args:
        config: the teacher's.
        layers: kind and sizes of each converted layer's mixer.
    """
    if spec.stock_export != NAME:
        return [f"its decoder layers are not those of {config.model_type}"]
    found = []
    others = sorted({kind for kind, _ in layers.values()} - {Mamba2Mixer.kind})
    if others:
        found.append(f"its converted layers are {Mamba2Mixer.kind}, not {', '.join(others)}")
    attention = spec.shape(config)
    if attention.heads * attention.head_dim != attention.hidden:
        found.append(f"its heads are {attention.hidden} wide in all, not {attention.heads} x {attention.head_dim}")
    kept = [i for i in range(attention.layers) if i not in layers]
    if any(spec.window(config, i) is not None for i in kept):
        found.append("its attention has no sliding window")
    if config.hidden_act != "silu":
        found.append(f"its convolution is followed by the MLP's activation, so silu, not {config.hidden_act}")
    if getattr(config, "mlp_bias", False):
        found.append("its MLP has no biases")
    if getattr(config, "num_local_experts", 0):
        found.append("its experts are other ones")
    return found


@torch.no_grad()
def stock_of(student: Any) -> GraniteMoeHybridForCausalLM:
    """The same model without this package's classes; `obstacles` must be empty. Weights are copies."""
    from transformers import GraniteMoeHybridForCausalLM

    config = config_of(student)
    with torch.device("meta"):
        stock: Any = GraniteMoeHybridForCausalLM(config)
    stock.to_empty(device=student.device).to(student.dtype)
    # its tables are computed, not loaded
    stock.model.rotary_emb = type(stock.model.rotary_emb)(config).to(student.device)
    linear = [word == "linear_attention" for word in config.layer_types or ()]
    stock.load_state_dict(renamed(student, linear, bool(config.attention_bias), bool(config.mamba_proj_bias)))
    stock.tie_weights()
    stock.generation_config = GenerationConfig.from_dict(student.generation_config.to_dict())
    return stock.eval()


def config_of(student: Any) -> GraniteMoeHybridConfig:
    """Its config: the teacher's sizes and RoPE, the mixers' sizes, multipliers of 1 where the family has none."""
    from transformers import GraniteMoeHybridConfig

    teacher = student.config.text_config
    attention, layers = family_of(teacher).shape(teacher), student.config.layers()
    mixer: MixerShape = next(iter(layers.values()))[1]
    values: dict[str, Any] = {name: getattr(teacher, name) for name in SAME}
    values |= {name: getattr(teacher, name, 1.0) for name in MULTIPLIERS}
    values |= {
        "layer_types": ["linear_attention" if i in layers else "full_attention" for i in range(attention.layers)],
        "rope_parameters": copy.deepcopy(teacher.rope_parameters), "position_embedding_type": "rope",
        "attention_multiplier": attention.scale, "attention_bias": attention.qkv_bias or attention.out_bias,
        "shared_intermediate_size": teacher.intermediate_size, "num_local_experts": 0, "num_experts_per_tok": 0,
        "mamba_n_heads": mixer.heads, "mamba_n_groups": mixer.groups, "mamba_d_head": mixer.head_dim,
        "mamba_d_state": mixer.state, "mamba_d_conv": mixer.conv_kernel, "mamba_expand": mixer.inner // mixer.hidden,
        "mamba_conv_bias": True, "mamba_proj_bias": mixer.out_bias, "dtype": student.dtype,
    }  # fmt: skip
    return GraniteMoeHybridConfig(**values)


def renamed(student: Any, linear: Sequence[bool], attention_bias: bool, mixer_bias: bool) -> dict[str, Tensor]:
    """The student's tensors under the stock model's names; biases that the student lacks are 0.

    Args:
        linear: of each layer whether it is converted.
        attention_bias, mixer_bias: whether the stock model's projections have biases, there and here.
    """
    tensors = {}
    for name, tensor in student.state_dict().items():
        place = name.rpartition("_proj.")[0]
        if place.endswith("mlp.gate"):
            up = student.get_parameter(name.replace("gate_proj", "up_proj"))
            tensors[name.replace("mlp.gate_proj", "shared_mlp.input_linear")] = torch.cat([tensor, up])
        elif place.endswith("mlp.down"):
            tensors[name.replace("mlp.down_proj", "shared_mlp.output_linear")] = tensor
        elif not place.endswith("mlp.up"):
            index = name.removeprefix("model.layers.").partition(".")[0]
            converted = index.isdigit() and linear[int(index)]
            tensors[name.replace("self_attn", "mamba") if converted else name] = tensor
    for index, converted in enumerate(linear):
        if mixer_bias if converted else attention_bias:
            parts = ("mamba.in_proj", "mamba.out_proj") if converted else [f"self_attn.{x}_proj" for x in "qkvo"]
            for part in parts:
                name = f"model.layers.{index}.{part}"
                tensors.setdefault(f"{name}.bias", torch.zeros_like(tensors[f"{name}.weight"][:, 0]))
    return tensors
