"""What the start token is worth to a teacher: perplexity of held-out windows with it and without it.

`python -m benchmarks.start_token gemma3-270m`. Windows of 512 tokens of the default text, the same labels both times:
the token stands in the place of each window's first, as in training.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

WINDOW, TOKENS = 512, 8192


def main() -> None:
    """Two perplexities and their ratio."""
    from ssmorph.convert.teachers import load_teacher
    from ssmorph.stages.chat import start_tokens
    from ssmorph.stages.config import DataConfig
    from ssmorph.stages.data import open_or_pack
    from ssmorph.stages.scores import score

    parser = argparse.ArgumentParser()
    parser.add_argument("teacher")
    teacher, tokenizer = load_teacher(parser.parse_args().teacher)
    if not start_tokens(tokenizer):
        print("its tokenizer puts no start token before a text")
        return
    with tempfile.TemporaryDirectory() as folder:
        data = open_or_pack(DataConfig(window=WINDOW), tokenizer, Path(folder) / "data", print)
        names = [name for name in data.heldout_names() if name != data.domain_name]
        found = {}
        for raw in (False, True):
            windows = [data.heldout_windows(name, WINDOW, TOKENS // len(names), raw=raw) for name in names]
            found[raw] = score(teacher, [], torch.cat(windows))["teacher"].summary()
    begun, bare = found[False]["perplexity"], found[True]["perplexity"]
    print(f"{found[True]['tokens']} tokens: perplexity {begun:.2f} with it, {bare:.2f} without: {bare / begun:.2f} x")


if __name__ == "__main__":
    main()
