"""Plug-and-play half-quadratic splitting: the denoiser as a prior, levels falling, no noise added."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from invguide.errors import InputError
from invguide.problem import Problem
from invguide.rng import Noise
from invguide.schedule import level_list
from invguide.solver import Requires, Solver
from invguide.symmetry import SYMMETRIES, turn_back, turn_image


class HQSState(NamedTuple):
    x: Tensor  # (B, *shape), after the data step
    denoised: Tensor  # (B, *shape), after the denoiser


class HQSInfo(NamedTuple):
    sigma: float


@dataclass(frozen=True)
class HQS(Solver[HQSState]):
    """Minimise -log p(y | x) - log p(x) by splitting it into a data step and a denoising step.

    Algorithm:
        z = T^-1 D(T x; s),   x <- argmin_x -log p(y | x) + lam |x - z|^2 / (2 s^2),   for s from sigma_start down to
        sigma_end; T goes through the eight mirror images and quarter turns.

    Source:
        Zhang et al. 2020, "Plug-and-play image restoration with deep denoiser prior", arXiv 2008.13751, alg. 1.

    Differences:
        Levels fall exponentially as there; lam is in the Bayesian scale (1 makes the data step exact for a Gaussian
        of variance s^2 around z). Turning the picture averages out what the network does to one orientation only;
        T is the identity unless the prior says that it is `symmetric`. The result is the last denoised image, not
        the data step after it.

    Bias:
        A point estimate near the posterior mode: no spread, so seeds agree and `std` is zero.
    """

    requires: ClassVar[Requires] = Requires(target="likelihood", gradient=True)

    point_estimate: ClassVar[bool] = True

    num_steps: int = 30
    lam: float = 0.19
    sigma_start: float = 0.7
    sigma_end: float = 0.05

    def __post_init__(self) -> None:
        if not (self.lam > 0 and 0 < self.sigma_end <= self.sigma_start):
            raise InputError(
                f"lam={self.lam}, sigma_start={self.sigma_start}, sigma_end={self.sigma_end}; expected lam > 0 and "
                "0 < sigma_end <= sigma_start"
            )

    def init(self, problem: Problem, noise: Noise) -> HQSState:
        x = problem.blank_estimate()
        return HQSState(x, x)

    def step(
        self, problem: Problem, state: HQSState, k: int, noise: Noise
    ) -> tuple[HQSState, HQSInfo]:
        s = level_list("exponential", self.num_steps, self.sigma_end, self.sigma_start)[k]
        turn = k % SYMMETRIES if problem.prior.symmetric else 0
        denoised = turn_back(problem.denoise(turn_image(state.x, turn), s), turn)
        x = problem.prox(denoised, s / self.lam**0.5)
        return HQSState(x, denoised), HQSInfo(s)

    def estimate(self, state: HQSState) -> Tensor:
        return state.denoised
