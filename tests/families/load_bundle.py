"""Run by test_bundle.py in a process of its own, without ssmorph: loads every folder and repeats what its parent did.

Arguments: the folder that holds the models, each in a folder with `expected.pt`; and where to save one of them again.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

BUNDLE = "modeling_ssmorph.py"


class Blocker:
    """Refuses ssmorph, which an editable install would otherwise find."""

    def find_spec(self, name: str, *_: Any) -> None:
        """Raises ImportError for our names."""
        if name.split(".")[0] == "ssmorph":
            raise ImportError(f"{name} is blocked")


def results(model: Any, x: Any) -> dict[str, Any]:
    """Logits whole, through the cache in three parts, padded on the left and packed; and greedy tokens."""
    import torch

    with torch.no_grad():
        cache, parts = None, []
        for start, end in ((0, 11), (11, 12), (12, 30)):
            out = model(x[:, start:end], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
        padded = torch.cat([torch.full((2, 5), 258), x], 1)
        mask = (padded != 258).long()
        positions = torch.cat([torch.arange(17), torch.arange(13)])[None]
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        return {
            "whole": model(x).logits,
            "cached": torch.cat(parts, 1),
            "padded": model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits[:, 5:],
            "packed": model(x[:1], position_ids=positions, use_cache=False).logits,
            "tokens": model.generate(padded, attention_mask=mask, **options)[:, padded.shape[1] :],
            "beams": model.generate(x, attention_mask=torch.ones_like(x), num_beams=2, **options)[:, x.shape[1] :],
        }


def compare(folder: Path, expected: dict[str, Any]) -> Any:
    """Loads one folder and asserts that it gives what its parent got; the model."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    own = results(model, expected["x"])
    for name in ("whole", "cached", "padded", "packed"):
        error, scale = (own[name] - expected[name]).abs().max(), expected[name].abs().max()
        assert error <= 1e-5 * scale, f"{folder.name}: {name} is off by {error} of {scale}"
    for name in ("tokens", "beams"):
        assert torch.equal(own[name], expected[name]), f"{folder.name}: {name} differ"
    return model


def main(models: Path, again: Path) -> None:
    """All folders; the last model is trained a step, saved and loaded once more."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    for folder in sorted(models.iterdir()):
        expected = torch.load(folder / "expected.pt")
        model = compare(folder, expected)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    fresh.train()(expected["x"]).logits.square().mean().backward()
    assert all(p.grad is not None for m in fresh.mixers().values() for p in m.parameters())
    model.save_pretrained(again)
    assert (again / BUNDLE).read_bytes() == (folder / BUNDLE).read_bytes()
    compare(again, expected)
    assert "ssmorph" not in sys.modules
    print("loaded", len(list(models.iterdir())))


if __name__ == "__main__":
    sys.meta_path.insert(0, Blocker())  # type: ignore[arg-type]
    main(Path(sys.argv[1]), Path(sys.argv[2]))
