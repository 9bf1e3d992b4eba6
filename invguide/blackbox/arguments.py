"""The arguments of a black box: what is wrong with them, and what a function takes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from invguide.blackbox.command import Command
from invguide.blackbox.workers import is_threads
from invguide.errors import InputError, suggest


def check_arguments(
    function: Any,
    workers: Any,
    timeout: Any,
    retries: Any,
    vectorised: bool,
    on_failure: Any,
    max_failed: Any,
    executor: Any,
    submit_kwargs: Any,
) -> None:
    """Raise InputError for arguments that make no sense."""
    command = isinstance(function, Command)
    if isinstance(function, str):
        raise InputError(
            f"the function is the text {function!r}; for a program pass ig.Command({function!r})"
        )
    if inspect.isclass(function):
        raise InputError(f"the function is the class {function.__name__}; pass an instance of it")
    if not callable(function):
        raise InputError(
            f"the function is a {type(function).__name__}; expected a callable or ig.Command(...)"
        )
    if command and vectorised:
        raise InputError(
            "vectorised=True with a Command, which gets one sample per call; leave it out"
        )
    if workers is not None and (not _is_int(workers) or workers < 1):
        raise InputError(
            f"workers is {workers!r}; expected at least 1, or None to call in this process"
        )
    if workers is not None and executor is not None:
        raise InputError("both workers and executor are given; give one")
    if executor is not None and (inspect.isclass(executor) or not hasattr(executor, "submit")):
        raise InputError(
            f"the executor is {executor!r}; expected an object with submit(function, *arguments), such as "
            f"concurrent.futures.ThreadPoolExecutor(4) or dask's client.get_executor()"
        )
    if submit_kwargs and executor is None:
        raise InputError(
            "submit_kwargs are for an executor; pass executor=... too, or leave them out"
        )
    if timeout is not None and not (_is_number(timeout) and 0 < timeout < math.inf):
        raise InputError(f"timeout is {timeout!r}; expected a positive number of seconds, or None")
    if timeout is not None and workers is None and executor is None and not command:
        raise InputError(
            f"timeout={timeout:g} cannot end a Python function in this process; give workers=1, a process that can "
            f"be killed"
        )
    if not _is_int(retries) or retries < 0:
        raise InputError(f"retries is {retries!r}; expected 0, 1, 2, ...")
    if on_failure not in ("drop", "raise"):
        raise InputError(
            f"on_failure is {on_failure!r}; {suggest(str(on_failure), ('drop', 'raise'))}"
        )
    if not _is_number(max_failed) or not 0 <= max_failed <= 1:
        raise InputError(f"max_failed is {max_failed!r}; expected a fraction between 0 and 1")
    if command and executor is None:
        function.check()


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def travels(function: Any, workers: int | None, executor: Any) -> bool:
    """Whether the function has to be pickled."""
    if executor is not None:
        return not is_threads(executor)
    return workers is not None and not isinstance(function, Command)


def kind_of(function: Any) -> list[str]:
    """What a function takes, "array" or "tensor", where it tells; else the first call finds out."""
    if isinstance(function, Command):
        return ["array"]
    if isinstance(function, nn.Module):
        return ["tensor"]
    try:
        first = next(iter(inspect.signature(function).parameters.values()), None)
    except (TypeError, ValueError):  # written in C
        return []
    hint = "" if first is None else str(first.annotation)
    if "Tensor" in hint:
        return ["tensor"]
    return ["array"] if "ndarray" in hint or "NDArray" in hint else []


def function_name(function: Callable[..., Any]) -> str:
    """For messages, and the same in every process."""
    if isinstance(function, Command):
        return function.words[0].rsplit("/", 1)[-1]
    if isinstance(function, partial):
        return function_name(function.func)
    return getattr(function, "__name__", type(function).__name__)
