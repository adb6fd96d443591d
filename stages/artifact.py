"""What a stage hands to the next: trained tensors and the mixers' sizes. Kept weights stay the teacher's."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ssmorph.convert.families import FamilySpec, family_of
from ssmorph.convert.mixers import Mixer, MixerShape, make_mixer
from ssmorph.convert.modeling import hybrid_of
from ssmorph.convert.surgery import MixerChoice, start_mixer

from .. import __version__
from ..errors import fail
from .config import RunConfig
from .context import trained_parameters

TENSORS, SIZES = "student.safetensors", "student.json"


def save_student(folder: Path, student: Any, rest: bool) -> None:
    """Writes mixers, and all other parameters where a stage trained them. The caller makes the folder atomic."""
    tensors = {name: p.detach().contiguous() for name, p in trained_parameters(student, rest).items()}
    save_file(tensors, folder / TENSORS)
    sizes = {str(i): {"kind": m.kind, "shape": m.shape.as_dict()} for i, m in sorted(student.mixers().items())}
    (folder / SIZES).write_text(json.dumps({"converted": sizes, "rest": rest}, indent=1))


def load_student(folder: Path, teacher: Any, own_rest: bool) -> Any:
    """The student of an artifact.

    Args:
        own_rest: give the student its own copy of the kept weights, because a stage will train them.

    Raises:
        ValueError: an artifact that is damaged or of another teacher.
    """
    try:
        saved = json.loads((folder / SIZES).read_text())
        tensors = load_file(folder / TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise fail(
            str(folder), "must hold a whole student", error, "Delete the stage's folder to run it again."
        ) from error
    spec = family_of(teacher.config)
    mixers = {}
    for i, m in saved["converted"].items():
        attention = copy.deepcopy(spec.attention(teacher, int(i))).requires_grad_(True)
        mixers[int(i)] = make_mixer(m["kind"], MixerShape(**m["shape"]), int(i), attention, spec.out, spec.head_rows())
    student = assemble(teacher, mixers, own_rest or saved["rest"])
    parameters = dict(student.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name not in parameters or parameters[name].shape != tensor.shape:
                raise fail(
                    str(folder / TENSORS), "must fit this teacher", name, "Use the teacher the run was made with."
                )
            parameters[name].copy_(tensor)
    return student


def earlier_students(run: Path, config: RunConfig, teacher: Any) -> list[tuple[str, Callable[[], Any]]]:
    """The name of every stage of a finished run but the last, and what loads the student it left."""
    names = config.stage_names()[:-1]
    return [(name, partial(load_student, run / name / "student", teacher, own_rest=False)) for name in names]


def copied_student(
    teacher: Any,
    spec: FamilySpec,
    layers: tuple[int, ...],
    choice: MixerChoice,
    seed: int,
    own_rest: bool,
) -> Any:
    """Surgery: the teacher with mixers in `layers`. The seed draws what is not copied, such as the stock gate."""
    torch.manual_seed(seed)
    mixers = {i: start_mixer(teacher, spec, i, choice) for i in layers}
    return assemble(teacher, mixers, own_rest)


def assemble(teacher: Any, mixers: dict[int, Mixer], own_rest: bool) -> Any:
    """The hybrid over the teacher's weights, or over a copy of them."""
    base = copy.deepcopy(teacher) if own_rest else teacher
    device = next(teacher.parameters()).device
    return hybrid_of(base, {i: m.to(device) for i, m in mixers.items()}, __version__)
