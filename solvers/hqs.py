"""Plug-and-play half-quadratic splitting: the denoiser as a prior, levels falling, no noise added."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from invguide.errors import InputError
from invguide.problem import Problem
from invguide.rng import Noise
from invguide.schedule import make_sigmas
from invguide.solver import Requires, Solver


class HQSState(NamedTuple):
    x: Tensor  # (B, *shape), after the data step
    denoised: Tensor  # (B, *shape), after the denoiser


class HQSInfo(NamedTuple):
    sigma: float


@dataclass(frozen=True)
class HQS(Solver[HQSState]):
    """Minimise -log p(y | x) - log p(x) by splitting it into a data step and a denoising step.

    Algorithm:
        z = D(x; s);   x <- argmin_x -log p(y | x) + lam |x - z|^2 / (2 s^2),   s falling from sigma_start to sigma_end

    Source:
        Zhang et al. 2020, "Plug-and-play image restoration with deep denoiser prior", arXiv 2008.13751, eq. 6-7, alg. 1.

    Differences:
        Levels fall exponentially as there; lam is in the Bayesian scale (1 makes the data step exact for a Gaussian of
        variance s^2 around z). The result is the last denoised image, not the data step after it.

    Bias:
        A point estimate near the posterior mode: no spread, so seeds agree and `std` is zero.
    """

    requires: ClassVar[Requires] = Requires(target="likelihood", gradient=True)

    num_steps: int = 30
    lam: float = 0.23
    sigma_start: float = 1.0
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

    def step(self, problem: Problem, state: HQSState, k: int, noise: Noise) -> tuple[HQSState, HQSInfo]:
        s = float(make_sigmas("exponential", self.num_steps, self.sigma_end, self.sigma_start)[k])
        denoised = problem.denoise(state.x, s)
        x = problem.prox(denoised, s / self.lam**0.5)
        return HQSState(x, denoised), HQSInfo(s)

    def estimate(self, state: HQSState) -> Tensor:
        return state.denoised
