"""What `solver="auto"` takes, for Python and the command line alike: one policy, and its reason in words."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from invguide.errors import CompatibilityError
from invguide.problem.problem import Problem
from invguide.solver import EnsembleSolver, Solver, misfits

SMALLEST_ENSEMBLE = 32  # for fewer samples, a method that draws them one by one

PARTICLES = "no gradient: particles, weighed and resampled"


class Choice(NamedTuple):
    """A solver with its settings, and why it was taken."""

    solver: Solver[Any]
    reason: str


def choose(problem: Problem, num_samples: int | None = None) -> Choice:
    """Return the best solver for this problem: exact ones first, then what measured best (`invguide bench`).

    One sample is the best single answer, a point estimate where there is a good one. Several are drawn by a sampler,
    never by a point estimator; fewer than 32 by no ensemble method.

    Args:
        problem: Prior, measurement or reward or both.
        num_samples: Samples per measurement; None: 1, or an ensemble where the method draws one.

    Raises:
        CompatibilityError: Nothing fits.
    """
    options = (
        _for_reward() if problem.likelihood is None else _for_measurement(problem, num_samples)
    )
    few = num_samples is not None and num_samples < SMALLEST_ENSEMBLE
    for choice in options:
        if (few and isinstance(choice.solver, EnsembleSolver)) or _too_few(
            choice.solver, problem, num_samples
        ):
            continue
        if not misfits(choice.solver, problem):
            return choice
    raise CompatibilityError(
        "no solver at hand works on this problem; make the operator or reward differentiable (torch operations only), "
        "or give a solver object"
    )


def _for_measurement(problem: Problem, num_samples: int | None) -> Iterator[Choice]:
    from invguide import solvers as s

    closed = f"{type(problem.prior).__name__} and a linear operator: the posterior in closed form"
    if num_samples is None or num_samples == 1:
        yield Choice(s.ExactPosterior(draw=False), f"{closed}, its mean")
        yield Choice(s.PosteriorMean(), "y is the signal with noise: the prior's own denoiser")
        reason = "counts of the picture itself: the prior's own denoiser, their noise made even"
        yield Choice(s.Anscombe(), reason)
        if problem.linear and problem.reward is None:
            steps = _hqs_steps(problem)
            yield Choice(s.HQS(num_steps=steps), "linear operator, one answer: best in PSNR")
        if problem.own_data_step and problem.reward is None:
            # A step to the mean is no compromise with the prior: lam = 1 takes the level as what it leaves open.
            reason = "an operator with a data step of its own, one answer: best in PSNR"
            yield Choice(s.HQS(lam=1.0), reason)
    else:
        yield Choice(s.ExactPosterior(), f"{closed}, drawn from")
        if problem.direct is not None:
            reason = "y is the signal with noise: the prior's sampler, from that noise level on"
        else:
            reason = "linear operator, Gaussian noise, several samples: best calibrated"
        if problem.reward is None:
            yield Choice(s.TweedieMatheron(), reason)
        if problem.own_data_step and problem.reward is None:
            # CRPS on six over-exposed photographs: 0.0188 (30 calls) against 0.0216 of DPS (100)
            reason = "an operator with a data step of its own, several samples: lowest CRPS"
            yield Choice(s.DiffPIR(num_steps=30, lam=4.0), reason)
    what = "a differentiable target" if problem.reward is not None else "a nonlinear operator"
    yield Choice(s.DPS(), what if not problem.linear else "a differentiable measurement")
    yield Choice(s.EnsembleTwisted(), "no gradient, fewer measured numbers than members")
    yield Choice(s.EnKG(), "no gradient, more measured numbers than members")
    yield Choice(s.FeynmanKac(), PARTICLES)
    yield Choice(s.DPSZerothOrder(), "no gradient, few samples: slopes by differences")


def _for_reward() -> Iterator[Choice]:
    from invguide import solvers as s

    yield Choice(s.DPS(), "a differentiable reward")
    yield Choice(s.FeynmanKac(), PARTICLES)
    yield Choice(s.SCG(), "no gradient, few samples: the best of several candidates")


def _hqs_steps(problem: Problem) -> int:
    """Calls within 0.1 dB of the best number: fewer, the more of x every number of y averages.

    On photographs of 128 pixels, against 30 steps: reductions to half the width lose 0.22 to 0.30 dB at 8 steps, 0.10
    to 0.15 at 12, 0.06 to 0.10 at 15 and 0.02 to 0.04 at 20 (noise 0.01 to 0.05, most at the least); to a quarter, at
    most 0.09 at 8 (`invguide bench steps`).
    """
    likelihood = problem.likelihood
    assert likelihood is not None
    if likelihood.known is not None:
        return 30
    numbers = likelihood.y[0].numel() / math.prod(problem.data_shape)
    return 8 if numbers <= 0.1 else 20 if numbers <= 0.3 else 30


def _too_few(solver: Solver[Any], problem: Problem, num_samples: int | None) -> bool:
    """Whether a method that weighs its members has fewer of them than one measurement has numbers."""
    if not (isinstance(solver, EnsembleSolver) and solver.requires.weighs and problem.likelihood):
        return False
    return problem.likelihood.y[0].numel() > (num_samples or solver.ensemble_size)
