"""Denoising in one network call: the prior's own posterior mean at the noise level of the measurement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from invguide.arguments.rules import Count
from invguide.numerics.symmetry import SYMMETRIES, turn_back, turn_image
from invguide.prior import denoise_at
from invguide.problem.problem import Problem
from invguide.rng import Noise
from invguide.solver import Requires, Solver


class PosteriorMeanState(NamedTuple):
    total: Tensor  # (B, *shape), the sum over the views so far
    denoised: Tensor  # (B, *shape), their mean


class PosteriorMeanInfo(NamedTuple):
    sigma: Tensor  # (B,), the noise level that the prior was told, normalised units


@dataclass(frozen=True)
class PosteriorMean(Solver[PosteriorMeanState]):
    """E[x | y] where the measurement is the signal itself, or an orthonormal transform of it, with Gaussian noise.

    Algorithm:
        x = mean over k of T_k^-1 D(T_k A* y; sigma_y),   T_k the first num_steps mirror images and quarter turns

        Where sigma_y is below the least level s that the prior knows, D(x; sigma_y) is x + sigma_y^2 score(x; s) =
        x + (sigma_y / s)^2 (D(x; s) - x). D(x; s) itself would take away more than the noise.

    Source:
        Robbins 1956, Miyasawa 1961 (Tweedie's formula): the denoiser of the prior at sigma_y is the posterior mean.
        For A A* = A* A = I, A* y = x + sigma_y A* n is such a noisy signal. The mean over views is geometric
        self-ensembling (Timofte, Rothe, Van Gool 2016, arXiv 1511.02228, sec. 3.5).

    Differences:
        None. Views other than the first are taken only where the prior says that it is `symmetric`.

    Bias:
        None for an exact prior. A point estimate: seeds agree, and `std` is NaN.

    Args:
        num_steps: Network calls, one for each of the eight mirror images and quarter turns, averaged, where the prior
            is `symmetric`. Default 1; up to 8 to average out what the network does to one orientation only.
    """

    requires: ClassVar[Requires] = Requires(
        target="likelihood", gradient=False, linear=True, gaussian=True, orthonormal=True
    )
    point_estimate: ClassVar[bool] = True

    num_steps: Count = 1

    def init(self, problem: Problem, noise: Noise) -> PosteriorMeanState:
        direct = problem.direct
        assert direct is not None
        blank = 0 * direct.signal
        return PosteriorMeanState(blank, blank)

    def step(
        self, problem: Problem, state: PosteriorMeanState, k: int, noise: Noise
    ) -> tuple[PosteriorMeanState, PosteriorMeanInfo]:
        turn = k % SYMMETRIES if problem.prior.symmetric else 0
        direct = problem.direct
        assert direct is not None
        view = turn_image(direct.signal, turn)
        denoised = denoise_at(problem.denoise, view, direct.noise, problem.prior.sigma_min)
        total = state.total + turn_back(denoised, turn)
        return PosteriorMeanState(total, total / (k + 1)), PosteriorMeanInfo(direct.level)

    def estimate(self, state: PosteriorMeanState) -> Tensor:
        return state.denoised
