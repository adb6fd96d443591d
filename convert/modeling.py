"""The hybrid as a transformers model: the teacher's own class with some self-attentions replaced by mixers.

No decoder is written here. `hybrid_class` derives from the teacher's class, so generation, masks, checkpointing and
weight names are the teacher's; the config nests the teacher's config whole and keeps the plan under its own key.
The model type is always ours: saved under the teacher's, a hybrid would reload with random attention.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..errors import fail
from .bundle import write_bundle
from .cache import check_mask
from .families import family_of
from .mixers import Mixer, MixerShape, State, make_mixer
from .mixers.mamba2 import GatedNorm

# what the hybrid's config and the teacher's, nested in it, both say
SHARED = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "output_hidden_states")
# what each says of itself; all else that the teacher's has is the teacher's
OWN = frozenset((
    "text_config", "converted", "places", "ssmorph_version", "model_type", "architectures", "auto_map", "dtype",
    "transformers_version", "quantization_config", "is_encoder_decoder", "id2label", "label2id", "problem_type",
    "return_dict",
))  # fmt: skip


class SsmorphConfig(PreTrainedConfig):
    """A hybrid's config.

    `text_config` is the teacher's config (transformers' name for a nested decoder, so that caches, masks and PEFT find
    it); `converted` maps a layer index to {"kind": mixer, "shape": sizes}; `places` says where the decoder layers are,
    where in a layer the mixer is, and where in an attention its output projection and, under `rows`, those of query,
    key and value if a few heads can have theirs alone.
    """

    model_type = "ssmorph"
    sub_configs: ClassVar = {"text_config": AutoConfig}
    text_config: Any = None
    converted: dict | None = None
    places: dict | None = None
    ssmorph_version: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.text_config, dict):
            self.text_config = AutoConfig.for_model(**self.text_config)
        if self.text_config is not None:
            for name in SHARED:
                # set before there was a teacher's config
                said = self.__dict__.get(name)
                if said is not None and said != getattr(type(self), name, None):
                    kwargs.setdefault(name, said)
                elif hasattr(self.text_config, name):
                    kwargs.setdefault(name, getattr(self.text_config, name))
            kwargs.setdefault("output_attentions", self.text_config.output_attentions)
            self.text_config._output_attentions = kwargs["output_attentions"]
            # the base class writes the outer choice of attention into the nested config, an absent one too
            kwargs.setdefault("attn_implementation", self.text_config._attn_implementation)
        for name in SHARED:
            if name in kwargs:
                setattr(self, name, kwargs.pop(name))
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers' from_dict; raises ValueError for another model's config."""
        kind = config_dict.get("model_type", cls.model_type)
        if kind != cls.model_type:
            raise fail("config.model_type", f"must be {cls.model_type}", kind, "Load it with AutoModelForCausalLM.")
        return super().from_dict(config_dict, **kwargs)

    def convert_rope_params_to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Nothing to do: the teacher's config has converted its own."""
        return kwargs

    def is_the_teachers(self, name: str) -> bool:
        """Whether a setting is one of the teacher's config, whose class reads it there."""
        teacher = self.__dict__.get("text_config")
        if not isinstance(teacher, PreTrainedConfig) or name in OWN or name.startswith("_"):
            return False
        return name in teacher.__dict__ or name in teacher.attribute_map or name in (*SHARED, "output_attentions")

    def __setattr__(self, name: str, value: Any) -> None:
        """What the teacher's config says is changed there, and what both say in both."""
        theirs = self.is_the_teachers(name)
        if not theirs or name in SHARED or hasattr(type(self), name):
            super().__setattr__(name, value)
        if theirs:
            setattr(self.text_config, name, value)

    def __getattr__(self, name: str) -> Any:
        """What this config lacks is the teacher's: its forward asks for multipliers, soft caps and the like."""
        teacher = self.__dict__.get("text_config")
        if name.startswith("_") or teacher is None or isinstance(teacher, dict):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(teacher, name)

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes config.json, and beside it the code that loads a hybrid without this package.

        A model saves its config by this, so whatever is saved or pushed can be loaded with trust_remote_code.
        """
        folder = Path(save_directory)
        assert not folder.is_file(), f"{folder} is a file"
        folder.mkdir(parents=True, exist_ok=True)
        self.auto_map = write_bundle(folder)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @property
    def vocab_size(self) -> int:
        """The teacher's vocabulary; a new size is written into the teacher's config."""
        return self.text_config.vocab_size

    @vocab_size.setter
    def vocab_size(self, size: int) -> None:
        self.text_config.vocab_size = size

    @property
    def hidden_size(self) -> int:
        """The teacher's width."""
        return self.text_config.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        """The teacher's depth."""
        return self.text_config.num_hidden_layers

    def layers(self) -> dict[int, tuple[str, MixerShape]]:
        """Converted layers: index to (mixer kind, sizes)."""
        return {int(k): (v["kind"], MixerShape(**v["shape"])) for k, v in (self.converted or {}).items()}


class SsmorphForCausalLM(PreTrainedModel, GenerationMixin):
    """Entry point for `from_pretrained`, `from_config` and direct construction; instances are of `hybrid_class`.

    `output_attentions` gives the kept layers' weights. A converted layer has none: transformers leaves it out of the
    tuple, or puts None there (Falcon).
    """

    config_class = SsmorphConfig
    # a recurrent state cannot be rolled back, so assisted generation has to be refused
    _is_stateful = True
    # the teacher's answer may be yes; static caches and masks that are trees are not for mixers
    _can_compile_fullgraph = False

    def __new__(cls, config: SsmorphConfig | None = None, *args: Any, **kwargs: Any) -> SsmorphForCausalLM:
        # blank_hybrid makes an instance of the hybrid's own class without a config
        return super().__new__(hybrid_class(config) if cls is SsmorphForCausalLM and config is not None else cls)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For pickle and deepcopy: the hybrid's own class is made at run time and has no name to be found by."""
        how = super().__reduce_ex__(protocol)
        teacher_class = getattr(self, "teacher_class", None)
        if teacher_class is None or type(self) is not _hybrid_class(teacher_class):
            return how
        return (blank_hybrid, (teacher_class,), *how[2:])

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """As transformers' from_pretrained; only safetensors are read."""
        path = pretrained_model_name_or_path
        if not isinstance(config, SsmorphConfig):
            keys = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
            config = SsmorphConfig.from_pretrained(config or path, **{k: kwargs[k] for k in keys if k in kwargs})
            for name in [k for k in kwargs if config.is_the_teachers(k)]:
                setattr(config, name, kwargs.pop(name))
        kwargs.setdefault("use_safetensors", True)
        target = hybrid_class(config) if cls is SsmorphForCausalLM else cls
        return super(SsmorphForCausalLM, target).from_pretrained(path, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: SsmorphConfig, **kwargs: Any) -> Any:
        target = hybrid_class(config) if cls is SsmorphForCausalLM else cls
        return super(SsmorphForCausalLM, target)._from_config(config, **kwargs)

    def mixers(self) -> dict[int, Mixer]:
        """The converted layers' mixers by layer index."""
        found: dict[int, Mixer] = {}
        for module in self.modules():
            if isinstance(module, Mixer):
                # a mixer inside another comes after it
                found.setdefault(module.layer_idx, module)
        return found


def hybrid_class(config: SsmorphConfig) -> type[SsmorphForCausalLM]:
    """The class of hybrids of this teacher."""
    return _hybrid_class(MODEL_FOR_CAUSAL_LM_MAPPING[type(config.text_config)])


@functools.cache
def _hybrid_class(teacher_class: type[PreTrainedModel]) -> type[SsmorphForCausalLM]:
    def __init__(self: Any, config: SsmorphConfig, *args: Any, **kwargs: Any) -> None:
        if not isinstance(config, SsmorphConfig):
            raise fail(
                "SsmorphForCausalLM",
                "is built from a SsmorphConfig",
                type(config).__name__,
                "Use convert or from_pretrained.",
            )
        # the nested config has to agree with what from_pretrained decided for the outer one
        if getattr(config, "_attn_implementation_internal", None) and not isinstance(config._attn_implementation, dict):
            config.text_config._attn_implementation = config._attn_implementation
        teacher_class.__init__(self, config.text_config, *args, **kwargs)
        config._attn_implementation_internal = config.text_config._attn_implementation_internal
        self.config = config
        # the teacher's class looked for the old key in its own config only
        self._backward_compatibility_gradient_checkpointing()
        places = config.places or {}
        names = (places.get("out", ""), places.get("rows", ()))
        for index, (kind, shape) in config.layers().items():
            attention = self.get_submodule(mixer_path(config, index))
            set_mixer(self, config, index, make_mixer(kind, shape, index, attention, *names))
        if config.layers():
            self.base_model.register_forward_pre_hook(_check_masks, with_kwargs=True)

    @torch.no_grad()
    def _init_weights(self: Any, module: nn.Module) -> None:
        teacher_class._init_weights(self, module)
        if isinstance(module, (Mixer, State)):
            for name, parameter in module.named_parameters(recurse=False):
                (init.ones_ if name == "D" else init.zeros_)(parameter)
        if isinstance(module, GatedNorm):
            init.ones_(module.weight)

    body = {
        "__init__": __init__,
        "_init_weights": _init_weights,
        "__module__": __name__,
        "teacher_class": teacher_class,
    }
    # transformers looks for the last among a class's own bases
    return type("SsmorphForCausalLM", (SsmorphForCausalLM, teacher_class, GenerationMixin), body)


def _check_masks(decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Looks at what a caller gives as masks: mixers cannot tell it from what the decoder makes of [batch, tokens]."""
    del args
    masks, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
    for mask in masks.values() if isinstance(masks, dict) else (masks,):
        # for a cache that compiles `generate` makes masks of its fixed size; mixers refuse it
        if isinstance(mask, Tensor) and mask.dim() == 4 and not getattr(cache, "is_compileable", False):
            check_mask(mask, kwargs.get("position_ids"), getattr(decoder.config, "sliding_window", None))


def blank_hybrid(teacher_class: Any) -> SsmorphForCausalLM:
    """An instance without modules, for pickle to fill."""
    hybrid = _hybrid_class(teacher_class)
    return object.__new__(hybrid)


def mixer_path(config: SsmorphConfig, layer: int) -> str:
    """Where in the model a layer's attention is, or the mixer in its place."""
    assert config.places is not None
    return f"{config.places['layers']}.{layer}.{config.places['mixer']}"


def set_mixer(model: nn.Module, config: SsmorphConfig, layer: int, mixer: Mixer) -> None:
    """Puts a mixer into the place of a layer's attention."""
    path, _, name = mixer_path(config, layer).rpartition(".")
    setattr(model.get_submodule(path), name, mixer)


def hybrid_of(teacher: PreTrainedModel, mixers: dict[int, Mixer], version: str) -> SsmorphForCausalLM:
    """A hybrid that shares every kept weight with `teacher` and has `mixers` in the converted layers."""
    converted = {str(i): {"kind": m.kind, "shape": m.shape.as_dict()} for i, m in sorted(mixers.items())}
    spec = family_of(teacher.config)
    places = {"layers": spec.layers, "mixer": spec.mixer, "out": spec.out, "rows": list(spec.head_rows())}
    # a copy: another attention for the hybrid, say, is not another for its teacher
    nested = copy.deepcopy(teacher.config)
    config = SsmorphConfig(text_config=nested, converted=converted, places=places, ssmorph_version=version)
    config.dtype = teacher.dtype
    with torch.device("meta"):
        student = SsmorphForCausalLM(config)
    _share_tensors(student, teacher)
    for index, mixer in mixers.items():
        set_mixer(student, config, index, mixer)
    student.generation_config = GenerationConfig.from_dict(teacher.generation_config.to_dict())
    student.tie_weights()
    return student.eval()


def _share_tensors(student: nn.Module, teacher: nn.Module) -> None:
    """Gives the student the teacher's own parameters and buffers wherever it kept the module."""
    modules = dict(student.named_modules())
    for store, tensors in (("_parameters", teacher.named_parameters), ("_buffers", teacher.named_buffers)):
        for name, tensor in tensors(remove_duplicate=False):
            parent, _, leaf = name.rpartition(".")
            if parent in modules:
                getattr(modules[parent], store)[leaf] = tensor


def register() -> None:
    """Makes AutoConfig and AutoModelForCausalLM know hybrids."""
    AutoConfig.register(SsmorphConfig.model_type, SsmorphConfig, exist_ok=True)
    AutoModelForCausalLM.register(SsmorphConfig, SsmorphForCausalLM, exist_ok=True)
