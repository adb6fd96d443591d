"""Hybrids as architectures that other software has, each with a proof that its logits are the same."""
