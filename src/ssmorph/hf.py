"""`import ssmorph.hf` makes transformers' Auto classes load converted hybrids."""

from .convert.modeling import SsmorphConfig, SsmorphForCausalLM, register

__all__ = ["SsmorphConfig", "SsmorphForCausalLM"]

register()
