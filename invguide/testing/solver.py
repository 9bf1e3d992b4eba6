"""check_solver: what every solver promises to the driver, and to those who read its results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from invguide.arguments.checks import checked
from invguide.errors import InputError
from invguide.problem import Problem
from invguide.solver import Solver
from invguide.testing.contract import keep
from invguide.testing.problems import default_problem
from invguide.testing.solver_fit import Fit
from invguide.testing.solver_runs import Runs
from invguide.testing.solver_settings import (
    settings_described,
    settings_refused,
    settings_round_trip,
)


@checked
def check_solver(
    solver: Solver[Any],
    problem: Problem | None = None,
    *,
    exceptions: Mapping[str, str] | None = None,
    control: Mapping[str, Any] | None = None,
    prior_draws: Tensor | None = None,
    device: str | torch.device = "cpu",
) -> None:
    """Check what every solver promises; return nothing, or raise the first promise that is broken.

    "settings described": `Args:` names each setting with its default, and nothing else.
    "settings refused": the constructor refuses values of another kind, NaN, and num_steps below 1.
    "settings round trip": a solver made of `settings` is equal, with an equal hash, and cannot be changed.
    "states": every tensor of a state has a row for each sample, in the type and on the device of the run; so has
    `estimate`, with the shape of the signals.
    "inputs unchanged": y, noise, operator, conditions, starting signals, prior and the state before a step stay.
    "seed": a seed gives the same bits, whatever the global generators are at; another seed, and another sample, differ
    unless it is a point estimate.
    "rows independent": other companions of a sample change no bit of it; chunks of other sizes and another order only
    what rounding can: 50 roundings of the largest number of the state for each step and network call. Of ensembles the
    size of network batches changes no more than that.
    "resume": stopped after each third of its steps and gone on from the checkpoint, a run gives the same bits.
    "refusals": what `requires` rules out is refused before the first network call, and what it allows runs: black boxes
    and priors without gradients, operators that are not linear, noise that is not Gaussian ...
    "conditions": other conditions of the prior give other samples, unless it refuses them.
    "unconditional control": where the target tells nothing, draws have mean and spread of the prior's, to five
    standard errors and the 6 % of a spread that 100 steps may leave out; not asked of point estimates.

    Args:
        solver: With few steps, as each is taken some thirty times; three or more, so that thirds differ.
        problem: What it is run on, in float64 for bounds that mean something; the operator may be of any kind. Default
            None: two measurements of two numbers under a mixture of Gaussians.
        exceptions: {promise: why this method cannot keep it}; such a promise has to be broken indeed. Default None.
        control: Settings for the control that differ from those of `solver`, such as more steps, or guidance_scale=0
            where the method follows any slope, however weak. Default None: num_steps=100, unless the schedule
            is given by levels, and an ensemble of 1000.
        prior_draws: Clean signals of the problem's prior, (N, *shape), normalised units: then the control is that
            problem with guidance_scale=0. Default None: a Gaussian of two numbers, and noise of a million spreads.
        device: Where it runs. Default "cpu".

    Raises:
        ContractError: A promise is broken; its name, what was expected and the numbers.
        InputError: An exception for no promise, or no problem where the solver needs a reward of its own kind.
    """
    runs = Runs(solver, problem or default_problem(solver), torch.device(device))
    fit = Fit(solver, problem, dict(control or {}), prior_draws, torch.device(device))
    promises = {
        "settings described": lambda: settings_described(solver),
        "settings refused": lambda: settings_refused(solver),
        "settings round trip": lambda: settings_round_trip(solver),
        "states": runs.states,
        "inputs unchanged": runs.inputs_unchanged,
        "seed": runs.seed,
        "rows independent": runs.rows_independent,
        "resume": runs.resume,
        "refusals": fit.refusals,
        "conditions": fit.conditions,
        "unconditional control": fit.control,
    }
    keep(f"{type(solver).__name__}({_shown(solver)})", promises, dict(exceptions or {}))


def _shown(solver: Solver[Any]) -> str:
    """Its settings that are not the default, in a few words."""
    kind = type(solver)
    try:
        usual = kind().settings
    except (InputError, TypeError):  # a setting without default
        usual = {}
    mine = {n: v for n, v in solver.settings.items() if n != "solver" and usual.get(n) != v}
    return ", ".join(f"{name}={value!r}" for name, value in mine.items())
