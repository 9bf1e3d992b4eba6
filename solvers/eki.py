"""EKI: ensemble Kalman inversion, the baseline that uses the prior for its first ensemble only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
from torch import Tensor

from invguide.arguments.rules import AtLeastOne, Count, OneOf, Positive, Several
from invguide.problem.problem import Problem
from invguide.rng import Noise
from invguide.sampling.ensemble import (
    correct,
    kalman_gain,
    normalised_gain,
    roll_out,
    roll_out_levels,
)
from invguide.solver import EnsembleSolver, Requires

TEMPERINGS = ("adaptive", "equal", "normalized")


class EKIState(NamedTuple):
    x0: Tensor  # (J, *shape), clean members
    spent: Tensor  # (J,), how much of the likelihood they have seen, 0 to 1, the same for all


class EKIInfo(NamedTuple):
    weight: float  # of this step
    chi2: Tensor  # (J,) before it, NaN where the forward model failed


@dataclass(frozen=True)
class EKI(EnsembleSolver[EKIState]):
    """Draw an ensemble from the prior, then assimilate the measurement in portions by the ensemble Kalman update.

    Algorithm:
        x_j <- probability flow (Heun, prior_steps) from sigma_max n_j
        r_j = (y - A x_j) / sigma_y
        x_j <- x_j - C_xr (C_rr + I / w)^-1 (r_j + n_j / sqrt(w)),   the w of all steps adding up to 1
        adaptive:  w = max(m / 2 mean(f), sqrt(m / 2 var(f))),  f_j = |r_j|^2 / 2, no more than what is left; the last
                   step takes what is left, and steps after w has reached 1 cost nothing
        equal:     w = 1 / num_steps
        normalized:  x_j <- x_j - step_size / |K|_F sum_i K_ji (x_i - mean),  K_ji = <r_j, r_i - mean> / J

    Source:
        Iglesias, Law, Stuart 2013, "Ensemble Kalman methods for inverse problems", arXiv 1209.2736; adaptive tempering:
        Iglesias, Yang 2021, "Adaptive regularisation for ensemble Kalman inversion", doi 10.1088/1361-6420/abd29b;
        "normalized": the EKI of the official code devzhk/enkg-pytorch (500 steps of size 2).

    Differences:
        The first ensemble is drawn from the diffusion prior; the released baseline has a Gaussian random field. Members
        whose forward model fails are left out of the covariances and move with the mean of the others.

    Bias:
        Exact for a Gaussian prior and a linear operator as the ensemble grows. Elsewhere the posterior is taken as
        Gaussian, and members leave the data for the affine span of the first ensemble: no denoiser brings them back.
        "normalized" collapses onto a fit of y.

    Args:
        num_steps: Updates, at most. Default 20; "normalized" needs hundreds.
        ensemble_size: J, members, which are the samples, at least 2. Default 128; more where y tells of more directions
            than that.
        tempering: How the likelihood is portioned: "adaptive", "equal" or "normalized", as above. Default "adaptive";
            "equal" for a fixed number of updates, "normalized" to repeat released runs.
        step_size: Size of an update of "normalized", no unit, above 0. Default 2.0; the others do not use it.
        prior_steps: Heun steps that draw the first ensemble from the prior, two network calls each but the last.
            Default 32; fewer where a rough draw will do.
        localised: Whether entries of the gain that the ensemble cannot tell from 0 are damped. Default False; True for
            ensembles smaller than the number of directions that matter.
        inflation: Factor of the distances to the mean after each update, at least 1. Default 1.0, none; a little more
            where the ensemble is too narrow.
    """

    requires: ClassVar[Requires] = Requires(target="likelihood", gradient=False, residuals=True)

    num_steps: Count = 20
    ensemble_size: Several = 128
    tempering: Annotated[str, OneOf(TEMPERINGS)] = "adaptive"
    step_size: Positive = 2.0
    prior_steps: Count = 32
    localised: bool = False
    inflation: AtLeastOne = 1.0

    def init(self, problem: Problem, noise: Noise) -> EKIState:
        sigma = problem.prior.sigma_max
        levels = roll_out_levels(problem, sigma, self.prior_steps)
        x0 = roll_out(problem, sigma * noise("init"), levels, second_order=True)
        return EKIState(x0, torch.zeros_like(x0.flatten(1)[:, 0]))

    def step(
        self, problem: Problem, state: EKIState, k: int, noise: Noise
    ) -> tuple[EKIState, EKIInfo]:
        left = 1 - state.spent[0].item()
        if left <= 0:
            return state, EKIInfo(0.0, torch.full_like(state.spent, float("nan")))
        residuals = problem.whitened(state.x0)
        chi2 = residuals.square().mean(1)
        gain, innovations, weight = normalised_gain, residuals, self.step_size
        if self.tempering != "normalized":
            weight = self._weight(residuals, k, left)
            gain = kalman_gain
            innovations = residuals + noise("perturbation", residuals.shape[1:]) / weight**0.5
        x0 = correct(
            state.x0,
            residuals,
            innovations,
            gain,
            weight,
            localised=self.localised,
            inflation=self.inflation,
        )
        if self.tempering != "normalized":
            state = state._replace(spent=state.spent + weight)
        return state._replace(x0=x0), EKIInfo(weight, chi2)

    def _weight(self, residuals: Tensor, k: int, left: float) -> float:
        if k == self.num_steps - 1:
            return left
        if self.tempering == "equal":
            return 1 / self.num_steps
        misfit = 0.5 * residuals[residuals.isfinite().all(1)].double().square().sum(1)
        m = residuals.shape[1]
        mean, variance = misfit.mean().item(), misfit.var().item()
        if min(mean, variance) <= 0:  # they do not differ, or fit y: no portion is too large
            return left
        return min(left, max(m / (2 * mean), (m / (2 * variance)) ** 0.5))

    def estimate(self, state: EKIState) -> Tensor:
        return state.x0
