"""Every error that invguide raises on purpose: the caller's mistakes, failed runs, and broken contracts."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class InvguideError(Exception):
    """Base class of every error raised on purpose."""


class InputError(InvguideError, ValueError):
    """The caller's mistake: names the value, what was expected and the fix. Exit code 2 on the command line."""


class ArgumentError(InputError, TypeError):
    """Something is called with arguments that it does not have, or without one that it needs."""


class ShapeError(InputError):
    """A tensor has another shape than the contract asks for."""


class CompatibilityError(InputError):
    """A solver needs something that this problem does not offer."""


class CheckpointError(InputError):
    """A checkpoint or weights file is damaged, or belongs to other settings."""


class MissingPackageError(InvguideError, ImportError):
    """An optional package is needed; the message holds the pip line."""


class RunError(InvguideError, RuntimeError):
    """The run itself failed. Exit code 1 on the command line."""


class DivergenceError(RunError):
    """A sample became non-finite, ran away, or ends large and worse than a blank one; the message is the diagnosis."""


class ContractError(InvguideError, AssertionError):
    """A solver, operator or prior breaks a promise, as `invguide.testing` found.

    Attributes:
        promise: Its name.
    """

    def __init__(self, message: str, promise: str) -> None:
        super().__init__(message)
        self.promise = promise


class BlackBoxError(RunError):
    """Too many calls of a black box failed; the message lists them and tells how to replay one."""


def suggest(name: str, options: Iterable[str]) -> str:
    """Return 'did you mean ...?' or the whole list of options, to end an error message with."""
    plain = {option.lower(): option for option in sorted(options)}
    close = difflib.get_close_matches(name.lower(), plain, n=1, cutoff=0.5)
    return (
        f"did you mean {plain[close[0]]!r}?"
        if close
        else f"choose one of: {', '.join(plain.values())}"
    )


def require(package: str, purpose: str, install: str | None = None) -> ModuleType:
    """Import an optional package, or raise MissingPackageError with the exact pip line."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        line = f"pip install {install or package.split('.')[0]}"
        raise MissingPackageError(f"{purpose} needs the package {package!r}: {line}") from error
