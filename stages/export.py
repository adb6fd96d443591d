"""Writes a hybrid as an architecture that other software has, with the proof that it is the same model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import fail
from .rundir import atomic_folder

PROOF = "parity.json"
# the largest difference of a logit that rounding may make, in standard deviations of the logits
TOLERANCE = 1e-3
ROWS, PREFILL, STEPS = 2, 64, 16
# what config.json calls the layers: words that transformers 4 and 5 read, and other software by these names alone
WORDS = {"linear_attention": "mamba", "full_attention": "attention"}
HEAD = """---
library_name: transformers
tags: [ssmorph, mamba2, hybrid]
---
# A Mamba-2 hybrid as {name}

Written by ssmorph {version}; loads without it:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("this folder")
```

transformers 5.23 or newer is needed: before, the norm behind the scan spans all heads instead of each of its {groups}
groups, which gives other logits without an error. In float32, on random tokens, logits differ from those of the hybrid
that this was written from by at most {full:.1e} of their standard deviation in one pass and {decoded:.1e} token by
token. Other software was not tried.

"""


class Parity(NamedTuple):
    """The largest difference of logits, in standard deviations: all tokens at once, and behind a prompt one by one."""

    full: float
    decoded: float


def export(source: str | Path, out: str | Path | None = None, say: Callable[[str], None] = print) -> Path:
    """Writes a hybrid of `mamba2` layers for transformers' own GraniteMoeHybrid; returns the folder.

    Args:
        source: a finished run, or a folder that save_pretrained wrote.
        out: where to; granitemoehybrid in the run where left out. A former export there is replaced as a whole.

    Raises:
        ValueError: no hybrid, one with layers the architecture lacks, other logits, or a folder that is in use.
    """
    from transformers import AutoTokenizer

    from ssmorph.convert.export.granite import NAME, obstacles, stock_of
    from ssmorph.convert.families import family_of
    from ssmorph.convert.modeling import SsmorphConfig, SsmorphForCausalLM, register

    run = Path(source)
    folder = run / "final" if (run / "final").is_dir() else run
    if not (folder / "config.json").is_file():
        raise fail("export", "must be a finished run or a hybrid's folder", str(source), "Run: ssmorph convert RECIPE.")
    if out is None and folder == run:
        raise fail("export", "a folder that is no run needs --out", str(source), "Say where to write.")
    target = Path(out) if out is not None else run / NAME
    if target.exists() and not (target / PROOF).is_file():
        raise fail("export --out", "must not exist, or be a former export", str(target), "Name another folder.")
    register()
    config: Any = SsmorphConfig.from_pretrained(folder)
    missing = obstacles(config.text_config, family_of(config.text_config), config.layers())
    if missing:
        do = "Load this hybrid with `import ssmorph.hf`, or convert with what `ssmorph plan` says fits."
        raise fail("export", f"{NAME} must have all that the hybrid has", "; ".join(missing), do)
    hybrid = SsmorphForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    stock: Any = stock_of(hybrid)
    tokens_BL = _random_tokens(config.vocab_size)
    parity = measured(hybrid, stock, tokens_BL)
    say(f"logits differ by {parity.full:.1e} in one pass, {parity.decoded:.1e} token by token (standard deviations)")
    if not max(parity) <= TOLERANCE:
        rule = f"logits must agree within {TOLERANCE} of their standard deviation"
        raise fail(
            "export", rule, f"{parity}", f"Nothing was written. Is transformers 5.23 or newer? Report this {NAME}."
        )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with atomic_folder(target) as partial:
        stock.to(config.dtype or torch.float32).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        _spell(partial / "config.json")
        proof = {"architecture": NAME, **parity._asdict(), "tokens": list(tokens_BL.shape), "steps": STEPS}
        (partial / PROOF).write_text(json.dumps(proof, indent=1) + "\n", encoding="utf-8")
        (partial / "README.md").write_text(_card(folder, stock.config, parity), encoding="utf-8")
    say(f"done: {target}")
    return target


@torch.no_grad()
def measured(hybrid: Any, stock: Any, tokens_BL: Tensor) -> Parity:
    """How far the stock model's logits are from the hybrid's; tokens are random, so that none is likely."""
    expected = hybrid(tokens_BL).logits
    full = stock(tokens_BL).logits
    out = stock(tokens_BL[:, :PREFILL], use_cache=True)
    steps = [out.logits]
    for position in range(PREFILL, tokens_BL.shape[1]):
        token = tokens_BL[:, position : position + 1]
        steps.append(stock(token, past_key_values=out.past_key_values, use_cache=True).logits)
    size = expected.std()
    return Parity(*(float((logits - expected).abs().max() / size) for logits in (full, torch.cat(steps, dim=1))))


def _random_tokens(vocabulary: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (ROWS, PREFILL + STEPS), generator=generator)


def _spell(file: Path) -> None:
    """Names in config.json that older readers know as well."""
    config = json.loads(file.read_text(encoding="utf-8"))
    config["layer_types"] = [WORDS[word] for word in config["layer_types"]]
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _card(folder: Path, config: Any, parity: Parity) -> str:
    """How to load it, then what the hybrid's own card says of data and results."""
    from .. import __version__

    head = HEAD.format(name=config.model_type, version=__version__, groups=config.mamba_n_groups, **parity._asdict())
    own = folder / "README.md"
    _, data, rest = (own.read_text(encoding="utf-8") if own.is_file() else "").partition("## Data")
    return head + data + rest
