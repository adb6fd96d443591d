"""Which implementation of an operation runs: a table of names, imported only when chosen."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ssmorph.errors import fail, nearest

ENVIRONMENT = "SSMORPH_BACKEND"
Refusal = Callable[[torch.device], str | None]
log = logging.getLogger(__name__)


class Backends:
    """The backends of one operation, the preferred one first.

    A request is the caller's `backend` argument, or else the environment variable SSMORPH_BACKEND, which holds for
    every operation. Without a request the first backend that does not refuse the device is taken; on a GPU `on_gpu`
    comes before all others. Where the preferred one refuses, or cannot do what a call asks for, the log says why
    another one runs.

    Args:
        op_name: the operation, as errors and the log name it.
        targets: backend name -> 'module:function', imported at first use, the best on a CPU first.
        on_gpu: the name of the backend to prefer on a GPU.
        refuses: backend name -> a function that says why the backend cannot run on a device, or None where it can.
            It is asked at every call and before the import, so it must be quick and not need what the backend needs.
    """

    def __init__(
        self,
        op_name: str,
        targets: Mapping[str, str],
        refuses: Mapping[str, Refusal] | None = None,
        on_gpu: str | None = None,
    ) -> None:
        self.op_name = op_name
        self._targets = dict(targets)
        self._refuses = dict(refuses or {})
        self._on_gpu = on_gpu
        self._logged: set[tuple[str, str]] = set()

    @property
    def names(self) -> tuple[str, ...]:
        """The known names, the preferred one on a CPU first."""
        return tuple(self._targets)

    def refusal(self, name: str, device: torch.device) -> str | None:
        """Why a known backend cannot run on the device, or None where it can."""
        return self._refuses[name](device) if name in self._refuses else None

    def choose(self, requested: str | None, device: torch.device, unfit: Mapping[str, str | None] | None = None) -> str:
        """The name of the backend to run on the device; logs each new choice once.

        Args:
            unfit: backend name -> why it cannot do what this call asks for; one that was requested says so itself.

        Raises:
            ValueError: a requested name that is unknown or refuses the device, or no backend for the device.
        """
        where = f"{self.op_name}.backend" if requested else ENVIRONMENT
        requested = requested or os.environ.get(ENVIRONMENT)
        name = self._requested(where, requested, device) if requested else self._first(device, unfit or {})
        if (name, device.type) not in self._logged:
            self._logged.add((name, device.type))
            self._log(name, device, where if requested else None, unfit or {})
        return name

    def _log(self, name: str, device: torch.device, where: str | None, unfit: Mapping[str, str | None]) -> None:
        best = self._order(device)[0]
        if where is None and best != name:
            why = self.refusal(best, device) or unfit.get(best)
            log.warning("%s: backend %s on %s, since %s", self.op_name, name, device.type, why)
        else:
            why = f"as {where} asks" if where else "the best one here"
            log.info("%s: backend %s on %s, %s", self.op_name, name, device.type, why)

    def refusals(self, device: torch.device) -> dict[str, str]:
        """The backends that cannot run on the device, with the reason."""
        reasons = {name: self.refusal(name, device) for name in self._targets}
        return {name: reason for name, reason in reasons.items() if reason is not None}

    def load(
        self, requested: str | None, device: torch.device, unfit: Mapping[str, str | None] | None = None
    ) -> Callable[..., Any]:
        """The function of the chosen backend; arguments as `choose` has them.

        Raises:
            ValueError: as `choose`, and a backend whose module needs a package that is not installed.
        """
        name = self.choose(requested, device, unfit)
        module, function = self._targets[name].split(":")
        try:
            loaded: Callable[..., Any] = getattr(importlib.import_module(module), function)
        except ModuleNotFoundError as error:
            rule = f"backend {name!r} needs a package that is not installed"
            raise fail(self.op_name, rule, error.name, "Install it or name another backend.") from error
        return loaded

    def _requested(self, where: str, name: str, device: torch.device) -> str:
        if name not in self._targets:
            raise fail(where, f"must name a backend of {self.op_name}", repr(name), nearest(name, self._targets))
        reason = self.refusal(name, device)
        if reason is not None:
            raise fail(
                where, f"backend {name!r} must run on {device.type}", reason, "Leave it out to use the best one."
            )
        return name

    def _first(self, device: torch.device, unfit: Mapping[str, str | None]) -> str:
        reasons: dict[str, str | None] = {}
        for name in self._order(device):
            reasons[name] = self.refusal(name, device) or unfit.get(name)
            if reasons[name] is None:
                return name
        raise fail(self.op_name, f"needs a backend for {device.type}", reasons, "Use another device.")

    def _order(self, device: torch.device) -> tuple[str, ...]:
        first = (self._on_gpu,) if device.type == "cuda" and self._on_gpu else ()
        return (*first, *(name for name in self._targets if name not in first))
