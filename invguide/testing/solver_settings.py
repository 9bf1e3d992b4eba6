"""Promises of a solver's settings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from invguide.arguments.docstrings import misdescribed
from invguide.solver import Solver
from invguide.testing.contract import Broken, expect


def settings_described(solver: Solver[Any]) -> None:
    wrong = misdescribed(type(solver))
    expect(not wrong, f"{'; '.join(wrong)}. Write each setting in the Args section of the class")


def settings_refused(solver: Solver[Any]) -> None:
    """A value of no kind that a setting could have is refused for each of them, and what is no count of steps."""
    bad: list[tuple[str, Any]] = [
        ("num_steps", value) for value in (0, -1, 1.5, math.inf, "many", True, None)
    ]
    for field in dataclasses.fields(solver):
        bad += [(field.name, value) for value in (object(), math.nan, b"bytes")]
    for name, value in bad:
        text = _refusal(
            lambda name=name, value=value: dataclasses.replace(solver, **{name: value})
        )
        hint = (
            f"annotate {name} with a rule of invguide.arguments.rules, such as Count or Positive"
        )
        expect(
            text is not None, f"the constructor takes {name}={value!r}; expected an error. {hint}"
        )
        expect(
            name in str(text),
            f"the error for {name}={value!r} does not name {name}: {text}",
        )


def _refusal(make: Callable[[], object]) -> str | None:
    try:
        make()
    except (ValueError, TypeError) as error:
        return str(error)
    return None


def settings_round_trip(solver: Solver[Any]) -> None:
    settings = {name: value for name, value in solver.settings.items() if name != "solver"}
    told = solver.settings.get("solver")
    name = type(solver).__name__
    expect(told == name, f"settings['solver'] is {told!r}; expected {name!r}")
    again = type(solver)(**settings)
    expect(again == solver, f"made of its settings it is {again!r}, and not {solver!r}")
    try:
        hashes = hash(again), hash(solver)
    except TypeError as error:
        raise Broken(
            f"it has no hash ({error}); settings are numbers, strings and tuples"
        ) from error
    expect(hashes[0] == hashes[1], f"equal solvers have the hashes {hashes[0]} and {hashes[1]}")
    try:
        object.__getattribute__(solver, "__setattr__")("num_steps", solver.num_steps)
    except dataclasses.FrozenInstanceError:
        return
    raise Broken("its settings can be changed; expected @dataclass(frozen=True)")
