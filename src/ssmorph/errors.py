"""Errors a user can cause, in one form: *where: rule; got X. Do Y.* Standard library only: every room may use it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake of the user's; the command line prints it without a traceback."""


def fail(where: str, rule: str, got: object, do: str) -> UserError:
    """Builds the error `where: rule; got X. Do Y.` for the caller to raise.

    >>> str(fail("plan.layers", "a layer must be in 0..29", 40, "Name a layer of the model."))
    'plan.layers: a layer must be in 0..29; got 40. Name a layer of the model.'
    """
    return UserError(f"{where}: {rule}; got {got}. {do}")


def require(ok: bool, where: str, rule: str, got: object, do: str) -> None:
    """Raises the error that `fail` builds, unless `ok`."""
    if not ok:
        raise fail(where, rule, got, do)


def nearest(word: str, known: Iterable[str]) -> str:
    """The sentence that suggests the closest known name, or lists the known names where none is close.

    >>> nearest("logit", ["logits", "hidden"])
    "Did you mean 'logits'?"
    """
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else f"Known names: {', '.join(names)}."
