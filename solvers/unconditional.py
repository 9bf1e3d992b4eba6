"""Samples of the prior itself: the control that every other solver is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from invguide.arguments.rules import Count, NonNegative
from invguide.problem.problem import Problem
from invguide.reverse import ddim
from invguide.rng import Noise
from invguide.schedule import Schedule
from invguide.solver import Requires, Solver


class UnconditionalState(NamedTuple):
    x: Tensor  # (B, *shape) at the current level
    denoised: Tensor  # (B, *shape), D of the last level visited


class UnconditionalInfo(NamedTuple):
    sigma: float
    denoised: Tensor


@dataclass(frozen=True)
class Unconditional(Solver[UnconditionalState]):
    """Draw from the prior, ignoring the measurement.

    Algorithm:
        x <- DDIM_eta(x, D(x; a), a -> b) down the schedule; eta = 1 is ancestral sampling, eta = 0 the
        probability-flow ODE by Euler's method.

    Source:
        Ho et al. 2020, arXiv 2006.11239, alg. 2; Song et al. 2020, arXiv 2010.02502, eq. 12; in the unscaled
        coordinates of Karras et al. 2022, arXiv 2206.00364.

    Differences:
        none

    Bias:
        Exact in the limit of many steps. With few, ancestral steps are under-dispersed (they ignore Var[x0 | x]).

    Args:
        num_steps: Noise levels, one network call each. Default 100; fewer are faster and less accurate.
        eta: Noise that a step adds, as a share of that of ancestral sampling. Default 1.0; lower, down to 0, the
            probability flow, for more spread with few steps.
        schedule: Noise levels: "karras", "exponential", "vp-linear" or "cosine" over the range of the prior, or
            num_steps + 1 levels of your own, normalised units, falling to 0. Default "karras"; another to repeat the
            runs of a paper.
    """

    requires: ClassVar[Requires] = Requires(target="none", gradient=False)
    warm_start: ClassVar[bool] = True

    num_steps: Count = 100
    eta: NonNegative = 1.0
    schedule: Schedule = "karras"

    def init(self, problem: Problem, noise: Noise) -> UnconditionalState:
        x = problem.begin(problem.levels(self.schedule, self.num_steps, 0)[0], noise("init"))
        return UnconditionalState(x, x.new_zeros(x.shape))

    def step(
        self, problem: Problem, state: UnconditionalState, k: int, noise: Noise
    ) -> tuple[UnconditionalState, UnconditionalInfo]:
        a, b = problem.levels(self.schedule, self.num_steps, k)
        denoised = problem.denoise(state.x, a)
        x = ddim(state.x, denoised, a, b, noise(), self.eta)
        return UnconditionalState(x, denoised), UnconditionalInfo(a, denoised)

    def estimate(self, state: UnconditionalState) -> Tensor:
        return state.denoised
