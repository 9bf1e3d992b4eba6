"""Denoising of counts in one network call: the prior's denoiser after a transform that evens their noise out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from invguide.arguments.rules import Count
from invguide.numerics.symmetry import SYMMETRIES, turn_back, turn_image
from invguide.prior import denoise_at
from invguide.problem.problem import Problem
from invguide.rng import Noise
from invguide.solver import Requires, Solver


class AnscombeState(NamedTuple):
    total: Tensor  # (B, *shape), the sum over the views so far, of stabilised pictures in normalised units
    denoised: Tensor  # (B, *shape), their mean, a signal again


class AnscombeInfo(NamedTuple):
    sigma: Tensor  # (B,), the noise level that the prior was told, normalised units


@dataclass(frozen=True)
class Anscombe(Solver[AnscombeState]):
    """The picture behind its own counts: their noise made even, one call of the denoiser, and back.

    Algorithm:
        z = f(y),   f(y) = 2 sqrt(k + 3/8 + r^2),   k = y / gain counts, r those of the noise of the reading
        z = mean over j of T_j^-1 D(T_j z; s),      z stretched so that f(dark) and f(bright) are those of signals
        x = f^-1(z), the exact unbiased inverse:    the x of which z is the mean of f(y)

    Source:
        Anscombe 1948; Makitalo and Foi 2013, "Optimal inversion of the generalized Anscombe transformation for
        Poisson-Gaussian noise", doi 10.1109/TIP.2012.2202675; `CountingLaw` has the formulas.

    Differences:
        The denoiser is that of a diffusion prior, at the level s = 2 / (f(bright) - f(dark)) of the stretched picture.

    Bias:
        The prior sees a picture through the curve f, and stands for one of that tone. A point estimate: seeds agree,
        and `std` is NaN.

    Args:
        num_steps: Network calls, one for each of the eight mirror images and quarter turns, averaged. Default 1; up to
            8 to average out what the network does to one orientation only.
    """

    requires: ClassVar[Requires] = Requires(
        target="likelihood", gradient=False, linear=True, counts=True
    )
    point_estimate: ClassVar[bool] = True

    num_steps: Count = 1

    def init(self, problem: Problem, noise: Noise) -> AnscombeState:
        blank = torch.zeros_like(problem.y).to(problem.like)
        return AnscombeState(blank, blank)

    def step(
        self, problem: Problem, state: AnscombeState, k: int, noise: Noise
    ) -> tuple[AnscombeState, AnscombeInfo]:
        counts = problem.counts
        assert counts is not None
        turn = k % SYMMETRIES
        view, sigma = turn_image(counts.stabilise(problem.y), turn), counts.level
        denoised = denoise_at(problem.denoise, view, sigma, problem.prior.sigma_min)
        total = state.total + turn_back(denoised, turn)
        signal = problem.prior.to_normalised(counts.unstabilise(total / (k + 1)))
        return AnscombeState(total, signal), AnscombeInfo(sigma)

    def estimate(self, state: AnscombeState) -> Tensor:
        return state.denoised
