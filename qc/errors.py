"""The exceptions of qc: one small tree, each answered by one clear sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ArtifactError",
    "ContextLengthError",
    "FormatError",
    "InputError",
    "ModelError",
    "QcError",
    "RecipeError",
    "StageError",
    "TargetError",
    "UnsupportedError",
    "VerificationError",
    "nearest",
]


class QcError(Exception):
    """Report a problem the user can act on: what was expected, what came, where, what to do.

    `origin` is the place in the user's model ("model.layers.0.self_attn.q_proj"), if there is one.
    """

    def __init__(self, message: str, *, origin: str | None = None) -> None:
        self.message = message
        self.origin = origin
        super().__init__(message if origin is None else f"{message} (at {origin})")


class TargetError(QcError, ValueError):
    """An unknown or malformed target, or a target that this machine is not."""


class RecipeError(QcError, ValueError):
    """An unknown recipe, or one whose passes do not fit together."""


class FormatError(QcError, ValueError):
    """A weight format that is unknown, malformed, or not possible for a weight of some shape."""


class ModelError(QcError):
    """A model that is missing, corrupt or of a kind no frontend reads."""


class UnsupportedError(QcError):
    """Something well-formed that qc does not do (yet)."""


class StageError(QcError):
    """A graph that is not what its stage promises; the message names the node."""


class VerificationError(QcError):
    """A result that differs from its reference by more than its tolerance."""


class ArtifactError(QcError):
    """A compiled artifact that is missing, corrupt, too new, or built for another machine."""


class InputError(QcError, ValueError):
    """An argument of a call that does not fit the model: shape, dtype, name or range."""


class ContextLengthError(InputError):
    """More tokens than the context of the model holds."""


def nearest(name: str, names: Iterable[str], *, limit: int = 3) -> str:
    """Return ' (did you mean "a" or "b"?)' for the names closest to `name`, or ''."""
    close = difflib.get_close_matches(name, sorted(set(names)), n=limit, cutoff=0.5)
    if not close:
        return ""
    return " (did you mean " + " or ".join(f'"{each}"' for each in close) + "?)"
