"""The closed-form posterior of a prior that has one, under a linear measurement with Gaussian noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from invguide.arguments.rules import Count
from invguide.problem.problem import Problem
from invguide.rng import Noise
from invguide.solver import Requires, Solver


class ExactPosteriorState(NamedTuple):
    x0: Tensor  # (B, *shape)


class ExactPosteriorInfo(NamedTuple):
    pass


@dataclass(frozen=True)
class ExactPosterior(Solver[ExactPosteriorState]):
    """Independent draws from p(x | y), exact: no network, no levels, no iterations.

    Algorithm:
        Gaussian: x ~ N(m + K (y - A m), C - K A C),   K = C A* (A C A* + sigma_y^2 I)^-1
        Gaussian field: the same by Matheron's rule; mixture: components reweighted by their evidence, then as above

    Source:
        Rasmussen, Williams 2006, "Gaussian processes for machine learning", A.6; `posterior` of the prior.

    Differences:
        None.

    Bias:
        None.

    Args:
        num_steps: Draws, of which the last counts. Default 1; more only cost time.
        draw: True: samples. False: the posterior mean, a point estimate. Default True; False for the best estimate in
            mean square.
    """

    requires: ClassVar[Requires] = Requires(
        target="likelihood", gradient=False, linear=True, gaussian=True, closed_form=True
    )

    num_steps: Count = 1
    draw: bool = True

    @property
    def point_estimate(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return not self.draw

    def init(self, problem: Problem, noise: Noise) -> ExactPosteriorState:
        return ExactPosteriorState(torch.zeros_like(noise("init")))

    def step(
        self, problem: Problem, state: ExactPosteriorState, k: int, noise: Noise
    ) -> tuple[ExactPosteriorState, ExactPosteriorInfo]:
        seeds = (noise.uniform("seed", (1,)).flatten().double() * 2**24).long().tolist()
        known: dict[int, object] = {}  # one posterior for each measurement
        rows = []
        for i, (measurement, _) in enumerate(noise.rows):
            if measurement not in known:
                known[measurement] = problem.closed_form_posterior(i)
            posterior = known[measurement]
            rows.append(posterior.sample(1, seeds[i])[0] if self.draw else posterior.mean)  # pyright: ignore[reportAttributeAccessIssue]
        x0 = torch.stack(rows).reshape(state.x0.shape).to(state.x0)
        return ExactPosteriorState(x0), ExactPosteriorInfo()

    def estimate(self, state: ExactPosteriorState) -> Tensor:
        return state.x0
