"""EnKG: ensemble Kalman guidance, for forward models that cannot be differentiated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, NamedTuple

import torch
from torch import Tensor

from invguide.arguments.rules import (
    AtLeastOne,
    Count,
    Fraction,
    NonNegative,
    OneOf,
    PositiveFraction,
    Several,
)
from invguide.errors import InputError
from invguide.problem.problem import Problem
from invguide.reverse import euler
from invguide.rng import Noise
from invguide.sampling.ensemble import (
    correct,
    kalman_gain,
    normalised_gain,
    roll_out,
    roll_out_levels,
    survivors,
)
from invguide.sampling.particles import flattened, replaced, shared
from invguide.schedule import Schedule, Window
from invguide.solver import EnsembleSolver, Requires

CORRECTIONS = ("kalman", "normalized")
UNKNOWN = -1.0


class EnKGState(NamedTuple):
    x: Tensor  # (J, *shape) at the current level
    denoised: Tensor  # (J, *shape), D of the last level visited
    expected: Tensor  # (J,), |r|^2 after the last update, had the black box been linear; UNKNOWN before, or if failed


class EnKGInfo(NamedTuple):
    sigma: float
    chi2: Tensor  # (J,) of the rolled-out members, NaN where the forward model failed, or unguided


@dataclass(frozen=True)
class EnKG(EnsembleSolver[EnKGState]):
    """Carry an ensemble down the probability flow; move it by what its members' measurements tell about each other.

    Algorithm:
        x_j <- Euler step of the probability flow from a to b, for every member j; before it, inside the window and
        num_updates times:
            r_j = (y - A(Phi_a(x_j))) / sigma_y,  Phi_a the flow from a to a clean signal: the Euler steps to come, or
                  n = min(1 + (num_steps - k) // rollout_divisor, rollout_max) longer ones
            kalman:      resample by exp(-w (|r_j|^2 - |e_j|^2) / 2), e_j the residual that the last update promised;
                         x_j <- x_j - C_xr (C_rr + I / w)^-1 (r_j + n_j / sqrt(w)),  and e_j from r_j likewise;
                         the w of all updates add up to guidance_scale
            normalized:  x_j <- x_j - guidance_scale / |K|_F sum_i K_ji (x_i - mean),  K_ji = <r_j, r_i - mean> / J
        C are covariances over the ensemble: no derivative of A, and none of the network.

    Source:
        Zheng, Chu, Wang, Kovachki, Baptista, Yue 2024, "Ensemble Kalman diffusion guidance: a derivative-free method
        for inverse problems", arXiv 2409.20175; official code devzhk/enkg-pytorch ("normalized").

    Differences:
        "kalman" (default) takes the implicit step with the noise of y in it, adds perturbations n_j (Burgers, van
        Leeuwen, Evensen 1998) and shares one likelihood among all updates. Phi_a takes the steps that the run itself
        will take, so that it leads to the same clean signal from every level, and these are the steps of a tempered
        ensemble Kalman inversion; with fewer and longer ones, as released, members miss y by their error, which is
        many sigma_y where that is small. perturb=False leaves n_j out, as the paper does. "normalized" is the released
        step, which knows no noise level; released settings are guidance_scale=2, num_steps=80, num_updates=2,
        window=(0.05, 0.95), rollout_divisor=4; in InverseBench window=(0, 1), rollout_divisor=8. Its decay has a
        floor relative to guidance_scale here, absolute there.
        The resampling is ours: an update moves members as if A(Phi_a) were linear, and where it is not, a member that
        cannot explain y slides back to where it was. The ratio of the true to the linearised likelihood tells them
        apart; it is one for any ensemble under a linear map. Weights are flattened to an effective size of
        ess_threshold J (1: none), and left out where y has as many numbers as there are members, which some linear map
        fits whatever they are, and where `localised`. Every member is denoised, whatever the batch; members
        whose forward model fails are left out of the covariances and move with the mean of the others, where they may
        succeed.

    Bias:
        "kalman" is exact for a Gaussian prior and a linear operator as ensemble and steps grow; with perturb=False it
        is too narrow. Small ensembles (J below the number of directions that matter) are off in the mean and too
        narrow: `localised` helps some. Of several modes the right ones are found, in proportions that are about
        right: what the prior flow does to a moved member is weighed by the measurement only. "normalized" collapses
        onto a fit of y: its spread means nothing.

    Args:
        num_steps: Euler steps of the flow. Default 30; fewer are faster, as network calls grow with the square of it
            unless roll-outs are shortened.
        ensemble_size: J, members, which are the samples, at least 2. Default 128; more where y tells of more directions
            than that.
        guidance_scale: Weight of the likelihood in all updates together, 0 or more. Default 1.0, Bayes' rule; for
            "normalized" the size of an update, 2 as released.
        correction: Rule of the update: "kalman" or "normalized", as above. Default "kalman"; "normalized" to repeat
            released runs.
        perturb: Whether "kalman" adds the noise n_j to what is to be explained. Default True; False, as in the paper,
            is too narrow.
        num_updates: Updates at each level, with a roll-out each. Default 1; 2 to repeat released runs.
        window: (start, end), fractions of the run between which there are updates, both ends and the first step left
            out. Default (0.05, 0.7); (0.05, 0.95) to repeat released runs.
        decay: Weight of an update at the end of the run, relative to the start, between which it falls linearly, 0 to
            1. Default 1.0, all the same; lower to update mostly early.
        ess_threshold: Smallest effective size that the resampling may leave, as a share of J, above 0 to 1. Default
            0.9; lower to weed out faster, 1 for no resampling.
        rollout_divisor: Roll-outs take 1 + (num_steps - k) // rollout_divisor steps. Default None, all that the run
            will take; 4 or 8, as released, to save network calls.
        rollout_max: Most steps of a roll-out. Default None, num_steps; fewer to save network calls.
        localised: Whether entries of the gain that the ensemble cannot tell from 0 are damped, and nothing is
            resampled. Default False; True for ensembles smaller than the number of directions that matter.
        inflation: Factor of the distances to the mean after each update, at least 1. Default 1.0, none; a little more
            where the ensemble is too narrow.
        schedule: Noise levels: "karras", "exponential", "vp-linear" or "cosine" over the range of the prior, or
            num_steps + 1 levels of your own, normalised units, falling to 0. Default "karras"; another to repeat the
            runs of a paper.
    """

    requires: ClassVar[Requires] = Requires(target="likelihood", gradient=False, residuals=True)
    warm_start: ClassVar[bool] = True

    num_steps: Count = 30
    ensemble_size: Several = 128
    guidance_scale: NonNegative = 1.0
    correction: Annotated[str, OneOf(CORRECTIONS)] = "kalman"
    perturb: bool = True
    num_updates: Count = 1
    window: Window = (0.05, 0.7)
    decay: Fraction = 1.0
    ess_threshold: PositiveFraction = 0.9
    rollout_divisor: Count | None = None
    rollout_max: Count | None = None
    localised: bool = False
    inflation: AtLeastOne = 1.0
    schedule: Schedule = "karras"

    def __post_init__(self) -> None:
        if not any(self.guided(k) for k in range(self.num_steps)):
            raise InputError(
                f"none of num_steps={self.num_steps} is inside window={self.window} (the first never is); take more"
            )

    def init(self, problem: Problem, noise: Noise) -> EnKGState:
        x = problem.begin(problem.levels(self.schedule, self.num_steps, 0)[0], noise("init"))
        return EnKGState(x, torch.zeros_like(x), x.new_full((len(x),), UNKNOWN))

    def step(
        self, problem: Problem, state: EnKGState, k: int, noise: Noise
    ) -> tuple[EnKGState, EnKGInfo]:
        a, b = problem.levels(self.schedule, self.num_steps, k)
        x, expected = state.x, state.expected
        chi2 = torch.full_like(expected, float("nan"))
        if self.guided(k) and self.guidance_scale > 0:
            for update in range(self.num_updates):
                x, residuals, expected = self._update(problem, x, expected, k, update, noise)
                chi2 = residuals.square().mean(1)
        denoised = problem.denoise(x, a)
        return EnKGState(euler(x, denoised, a, b), denoised, expected), EnKGInfo(a, chi2)

    def _update(
        self,
        problem: Problem,
        x: Tensor,
        expected: Tensor,
        k: int,
        update: int,
        noise: Noise,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the members after one update, the residuals before it, and those that it promises, squared."""
        residuals = problem.whitened(roll_out(problem, x, self.rollout_levels(problem, k)))
        survivors(residuals, x)  # too few are an error here, and not one of their weights
        weighs, strength = self._weighs(residuals), self.strength(k)
        if weighs:
            excess = 0.5 * (expected - residuals.square().sum(1)).double()
            excess[expected == UNKNOWN] = torch.nan
            last = self.strength(k if update else k - 1)
            uniform = shared(noise).uniform(f"resample {update}", ())
            chosen = replaced(flattened(last * excess, self.ess_threshold), uniform)
            x, residuals = x[chosen], residuals[chosen]
        innovations = residuals
        if self.correction == "kalman" and self.perturb:
            perturbation = noise(f"perturbation {update}", residuals.shape[1:])
            innovations = residuals + perturbation / strength**0.5
        move = partial(
            correct,
            residuals=residuals,
            innovations=innovations,
            gain=kalman_gain if self.correction == "kalman" else normalised_gain,
            strength=strength,
            inflation=self.inflation,
        )
        expected = torch.full_like(expected, UNKNOWN)
        if weighs:
            alive = survivors(residuals, x)
            expected[alive] = move(residuals)[alive].square().sum(1)
        return move(x, localised=self.localised), residuals, expected

    def _weighs(self, residuals: Tensor) -> bool:
        """Whether promises count: with as many measurements as members, some linear map keeps any."""
        wanted = self.correction == "kalman" and self.ess_threshold < 1 and not self.localised
        return wanted and residuals.shape[1] < len(residuals)

    def guided(self, k: int) -> bool:
        """Whether step k is corrected; never the first one, as released."""
        return self.window[0] * self.num_steps < k < self.window[1] * self.num_steps

    def rollout_levels(self, problem: Problem, k: int) -> Sequence[float]:
        """Levels of a roll-out at step k: those that the run itself has still to go through, or fewer."""
        left = problem.all_levels(self.schedule, self.num_steps)[k:]
        steps, divisor = len(left) - 1, self.rollout_divisor
        most = self.rollout_max or self.num_steps
        if divisor is None and steps <= most:
            return left
        steps = steps if divisor is None else 1 + (self.num_steps - k) // divisor
        return roll_out_levels(problem, left[0], min(steps, most))

    def strength(self, k: int) -> float:
        """Size of one update of step k where it is normalised, else the weight that it gives to the measurement."""
        if self.correction == "normalized":
            return self.guidance_scale * self._fade(k)
        total = sum(self._fade(i) for i in range(self.num_steps) if self.guided(i))
        return self.guidance_scale * self._fade(k) / (self.num_updates * total)

    def _fade(self, k: int) -> float:
        """From 1 at the first step linearly to `decay` after the last."""
        return self.decay + (1 - self.decay) * (self.num_steps - k) / self.num_steps

    def estimate(self, state: EnKGState) -> Tensor:
        return state.denoised
