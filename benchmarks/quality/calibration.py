"""How far calibration alone goes, without gradients: layers converted against tokens read.

`python -m benchmarks.quality.calibration` runs what is missing and prints what is there; `--table` prints it alone.
SmolLM2-135M to `mamba2`, uniform layers, windows of 512, seed 0; perplexity and KL on held-out documents.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .conversions import converted, keep, kept, scored

RECIPE = Path("configs/smollm2/135m-mamba2.yaml")
LAYERS = ("uniform-8", "uniform-15", "uniform-22", "all")
TOKENS = (2_048, 8_192, 32_768, 131_072)
STAGES = "stages=[{{kind: surgery}}, {{kind: calibrate, tokens: {tokens}, refine_steps: 0}}]"


def name(layers: str, tokens: int) -> str:
    """As a result is called."""
    return f"calibration-{layers}-{tokens}"


def main() -> None:
    """The runs that are missing, few tokens first, then the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--table", action="store_true")
    runs = [(layers, tokens) for tokens in TOKENS for layers in LAYERS]
    for layers, tokens in [] if parser.parse_args().table else runs:
        if kept(name(layers, tokens)) is None:
            done = converted(name(layers, tokens), RECIPE, [STAGES.format(tokens=tokens), f"student.layers={layers}"])
            keep(name(layers, tokens), {"layers": layers, "tokens": tokens, **scored(done)})
    for layers, tokens in runs:
        result = kept(name(layers, tokens))
        if result is not None:
            print(f"{layers:10} {tokens:7} tokens: x teacher {result['ratio']:.3f}, KL {result['kl']:.3f}")


if __name__ == "__main__":
    main()
