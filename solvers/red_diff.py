"""RED-diff: variational inference with a point mass, the diffusion prior as a regulariser by denoising."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
from torch import Tensor

from invguide.arguments.rules import Count, NonNegative, OneOf, Positive
from invguide.numerics.linear import per_sample
from invguide.problem.problem import Problem
from invguide.rng import Noise
from invguide.solver import Requires, Solver

WEIGHTS = ("bayes", "official")


class REDDiffState(NamedTuple):
    x0: Tensor  # (B, *shape), the point estimate mu
    first_moment: Tensor  # (B, *shape), of Adam
    second_moment: Tensor  # (B, *shape), of Adam


class REDDiffInfo(NamedTuple):
    sigma: Tensor  # (B,)
    chi2: Tensor  # (B,)


@dataclass(frozen=True)
class REDDiff(Solver[REDDiffState]):
    """Fit one clean signal to the measurement and, at falling noise levels, to the denoiser.

    Algorithm:
        x = mu + s n;   e = (x - D(x; s)) / s
        bayes:     mu <- Adam(mu, -grad log p(y | mu) + prior_weight (e - n) / s)
        official:  mu <- Adam(mu, A^T (A mu - y) / m + prior_weight s (e - n) / d)

    Source:
        Mardani, Song, Kautz, Vahdat 2023, "A variational perspective on solving inverse problems with
        diffusion models", arXiv 2305.04391, alg. 1 and prop. 2; official code NVlabs/RED-diff.

    Differences:
        "bayes" (default) weighs both terms as the KL divergence does: the true likelihood, and the score at
        level s. Levels fall exponentially from sigma_start to the noise of the measurement (below it the prior
        would only chase noise), and the rate falls with them. "official" uses means over m measurements and d
        unknowns of the plain residual and levels of the variance-preserving schedule, as released; but the result
        is mu after the last update (released: before it). Its residual is in units of y, so that prior_weight is too.

    Bias:
        Mode seeking: seeds differ by optimiser noise, not by the posterior.

    Args:
        num_steps: Updates, one network call each. Default 200; fewer are faster and less accurate.
        learning_rate: Adam's, normalised units, above 0; "bayes" lets it fall nearly to 0. Default 0.1; lower where the
            fit is unsteady.
        prior_weight: Weight of the prior against y, 0 or more: no unit, "official" in units of y. Default 0.25; higher
            for smoother results, lower to explain y more closely.
        weight: How both terms are weighed: "bayes" or "official", as above. Default "bayes"; "official" to repeat
            released runs, for Gaussian noise with one sigma_y.
        sigma_start: Of "bayes": first level, normalised units, above 0. Default 1.0; lower with few steps.
        sigma_end: Of "bayes": last level, normalised units, above 0. Default None: the noise in signals, between 0.02
            and 0.2; 0.05 where no level is known. Lower where the result explains y better than its noise, since the
            prior weighs more at low levels.
    """

    requires: ClassVar[Requires] = Requires(target="likelihood", gradient=True)
    warm_start: ClassVar[bool] = True
    point_estimate: ClassVar[bool] = True

    num_steps: Count = 200
    learning_rate: Positive = 0.1
    prior_weight: NonNegative = 0.25
    weight: Annotated[str, OneOf(WEIGHTS)] = "bayes"
    sigma_start: Positive = 1.0
    sigma_end: Positive | None = None

    def init(self, problem: Problem, noise: Noise) -> REDDiffState:
        x0 = problem.blank_estimate() if problem.start is None else problem.start
        return REDDiffState(x0, torch.zeros_like(x0), torch.zeros_like(x0))

    def step(
        self, problem: Problem, state: REDDiffState, k: int, noise: Noise
    ) -> tuple[REDDiffState, REDDiffInfo]:
        s, rate = self._level(problem, k)
        level = per_sample(s, state.x0)
        # The same n in x and in the residual: redrawing it would drown the difference in noise.
        n = noise()
        x = state.x0 + level * n
        residual = (x - problem.denoise(x, s)) / level - n
        _, chi2, slope = problem.gradient(state.x0)
        if self.weight == "official":
            sigma_y = problem.require_sigma_y("REDDiff(weight='official')")
            sizes = problem.y[0].numel(), state.x0[0].numel()
            gradient = self.prior_weight * level * residual / sizes[1]
            gradient = gradient - per_sample(sigma_y**2, slope) * slope / sizes[0]
        else:
            gradient = self.prior_weight * residual / level - slope
        x0, first, second = adam(
            state.x0, gradient, state.first_moment, state.second_moment, k, rate
        )
        return REDDiffState(x0, first, second), REDDiffInfo(s, chi2)

    def _level(self, problem: Problem, k: int) -> tuple[Tensor, float]:
        """Noise level of each row at step k, (B,), and the learning rate."""
        rows = problem.y.real.new_ones(len(problem.y))
        if self.weight == "official":
            s, _ = problem.levels("vp-linear", self.num_steps, k)
            return s * rows, self.learning_rate
        sigma_y = problem.noise_level
        if self.sigma_end is not None or sigma_y is None:
            end = (self.sigma_end or 0.05) * rows
        else:
            end = sigma_y.clamp(0.02, 0.2)
        progress = k / max(1, self.num_steps - 1)
        start = min(self.sigma_start, problem.top)
        s = start * (end.clamp_max(start) / start) ** progress
        return s, self.learning_rate * (1 - progress) + 1e-3

    def estimate(self, state: REDDiffState) -> Tensor:
        return state.x0


def adam(
    x: Tensor, gradient: Tensor, first: Tensor, second: Tensor, k: int, rate: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of Adam (arXiv 1412.6980, alg. 1), betas 0.9 and 0.99, as a pure function of its moments."""
    first = 0.9 * first + 0.1 * gradient
    second = 0.99 * second + 0.01 * gradient**2
    direction = first / (1 - 0.9 ** (k + 1))
    size = (second / (1 - 0.99 ** (k + 1))).sqrt() + 1e-8
    return x - rate * direction / size, first, second
