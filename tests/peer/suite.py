"""transformers' own test suite, read from a checkout: the wheel has no tests.

Its package is called `tests` as ours is, so it is imported under another name; inside, it imports relatively.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ssmorph.errors import fail

VARIABLE = "TRANSFORMERS"
NAME = "transformers_tests"
NEEDED = ("test_modeling_common.py", "generation/test_utils.py")


def mixins(checkout: str | None) -> tuple[type[Any], type[Any]]:
    """(ModelTesterMixin, GenerationTesterMixin) of the checkout at this path.

    Raises:
        ValueError: no path, or nothing of the suite below it.
    """
    tests = Path(checkout or "").expanduser().resolve() / "tests"
    missing = [name for name in NEEDED if not (tests / name).is_file()]
    if not checkout or missing:
        got = f"{checkout!r}" + (f", without {', '.join(f'tests/{name}' for name in missing)}" if checkout else "")
        raise fail(VARIABLE, "must be a checkout of transformers", got, f"Use make peer-tests {VARIABLE}=/path/to/it.")
    package = ModuleType(NAME)
    package.__path__ = [str(tests)]
    sys.modules[NAME] = package
    # the suite knows by its class's name what a model is for, and gives a causal language model labels
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault("ssmorph", "SsmorphForCausalLM")
    common = importlib.import_module(f"{NAME}.test_modeling_common")
    return common.ModelTesterMixin, importlib.import_module(f"{NAME}.generation.test_utils").GenerationTesterMixin


ModelTesterMixin, GenerationTesterMixin = mixins(os.environ.get(VARIABLE))
