"""What the checks of public methods cost: inside of a run, where they are left out, and from outside."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from invguide.arguments.entries import unchecked
from invguide.bench.overhead import timed
from invguide.likelihood import Likelihood
from invguide.operators import GaussianBlur, Identity
from invguide.priors import GaussianField
from invguide.problem.problem import Problem
from invguide.system.tables import Table

SHAPE = (3, 16, 16)  # so small that nothing hides what a call costs


def entry_checks(*, calls: int = 300, repeats: int = 15) -> Table:
    """Time the methods that solvers call most, as written, inside of a run and from outside, in turns.

    Args:
        calls: Of a method, in one measurement.
        repeats: Measurements of each kind; the figures are the least of them, in CPU time.
    """
    prior = GaussianField(SHAPE, scale=0.2, shift=0.5).float()
    x, blur = torch.full((1, *SHAPE), 0.5), GaussianBlur(1.0)
    problem = Problem(prior, Likelihood(blur, x, 0.1))
    rows, figures = [], {}
    for thing, method, arguments in (
        (Identity(), "forward", (x,)),
        (blur, "forward", (x,)),
        (prior, "denoise", (x, 1.0)),
        (problem, "denoise", (x, 1.0)),
        (problem, "evaluate", (x,)),
        (problem, "guide", (x, 1.0)),
    ):
        bound = getattr(thing, method)
        plain = partial(bound.__wrapped__, thing)
        times: dict[str, list[float]] = {"plain": [], "inside": [], "outside": []}
        for _ in range(repeats):
            with unchecked():
                times["plain"].append(_each(plain, arguments, calls))
                times["inside"].append(_each(bound, arguments, calls))
            times["outside"].append(_each(bound, arguments, calls))
        a, b, c = (min(t) for t in times.values())  # what else runs only adds
        share = b / a - 1
        name = f"{type(thing).__name__}.{method}"
        rows.append((name, *(f"{1e6 * t:.1f}" for t in (a, b, c)), f"{share:+.1%}"))
        figures[name] = {"plain": a, "inside": b, "outside": c, "share": share}
    head = ("method", "as written (µs)", "in a run (µs)", "from outside (µs)", "a run pays")
    return Table(head, tuple(rows), figures=figures)


def _each(call: Callable[..., Any], arguments: tuple[Any, ...], calls: int) -> float:
    """Seconds of one call."""

    def repeat() -> None:
        for _ in range(calls):
            call(*arguments)

    return timed(torch.device("cpu"), repeat) / calls
