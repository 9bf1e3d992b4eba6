"""Plug-and-play half-quadratic splitting: the denoiser as a prior, levels falling, no noise added."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from invguide.arguments.rules import Count, Positive
from invguide.errors import InputError
from invguide.numerics.harmonic import harmonic_extension
from invguide.numerics.linear import per_sample
from invguide.numerics.symmetry import SYMMETRIES, turn_back, turn_image
from invguide.problem.problem import Problem
from invguide.rng import Noise
from invguide.solver import Requires, Solver

LOWEST, UNKNOWN_NOISE = 0.02, 0.05  # normalised units, of pictures in [-1, 1]
# Last level where noise varies, in that of bright parts: of 0.55 to 1 the best on photographs of five counts.
UNEVEN = 0.75


class HQSState(NamedTuple):
    x: Tensor  # (B, *shape), after the data step
    denoised: Tensor  # (B, *shape), after the denoiser


class HQSInfo(NamedTuple):
    sigma: Tensor  # (B,)


@dataclass(frozen=True)
class HQS(Solver[HQSState]):
    """Minimise -log p(y | x) - log p(x) by splitting it into a data step and a denoising step.

    Algorithm:
        z = T^-1 D(T x; s),   x <- argmin_x -log p(y | x) + lam |x - z|^2 / (2 s^2),   for s from sigma_start down to
        sigma_end; T goes through the eight mirror images and quarter turns. The result is the last z; where a mask
        or clipping leaves entries out and sigma_y is below sigma_end, the x after it, since the data tell more than
        that level.

    Source:
        Zhang et al. 2020, "Plug-and-play image restoration with deep denoiser prior", arXiv 2008.13751, alg. 1.

    Differences:
        Levels fall exponentially as there; lam is in the Bayesian scale (1 makes the data step exact for a Gaussian
        of variance s^2 around z). Turning the picture averages out what the network does to one orientation only;
        T is the identity unless the prior says that it is `symmetric`. It starts at the proximal point
        of a blank signal; with pixels missing, at the harmonic extension of the others. The last level is that of the
        noise, and not a fixed one.

    Bias:
        A point estimate near the posterior mode: no spread, so seeds agree and `std` is NaN.

    Args:
        num_steps: Network calls. Default 30; reductions to half the width need 20, to a quarter 8, narrow blurs and
            single holes 15, motion blurs all (`invguide bench steps`).
        lam: Weight of z against y, above 0, no unit. Default 0.19; 1 where the data step is a mean
            (`Operator.posterior_mean`), higher for smoother results.
        sigma_start: First level, normalised units, above 0. Default 0.7; lower with few steps.
        sigma_end: Last level, normalised units, at most sigma_start. Default None: the noise in signals
            (`Problem.noise_level`; 0.75 of it for laws that are not Gaussian), at least 0.02; 0.4 of it, between 0.02
            and 0.05, where entries are not observed at all, or by an operator with a data step of its own, as clipping,
            since details there come from the last levels only; 0.05 where no level is known. Higher for smoother
            results.
    """

    requires: ClassVar[Requires] = Requires(target="likelihood", gradient=True)
    warm_start: ClassVar[bool] = True

    point_estimate: ClassVar[bool] = True

    num_steps: Count = 30
    lam: Positive = 0.19
    sigma_start: Positive = 0.7
    sigma_end: Positive | None = None

    def __post_init__(self) -> None:
        if self.sigma_end is not None and self.sigma_end > self.sigma_start:
            raise InputError(
                f"sigma_end={self.sigma_end} is above sigma_start={self.sigma_start}; expected the last level to be "
                "the lower one"
            )

    def init(self, problem: Problem, noise: Noise) -> HQSState:
        if problem.start is not None:
            return HQSState(problem.start, problem.start)
        x = _continued(problem) if _incomplete(problem) else problem.blank_estimate()
        return HQSState(x, x)

    def step(
        self, problem: Problem, state: HQSState, k: int, noise: Noise
    ) -> tuple[HQSState, HQSInfo]:
        end = self._end(problem, state.x)
        start = min(self.sigma_start, problem.top)
        s = start * (end.clamp_max(start) / start) ** (k / max(1, self.num_steps - 1))
        turn = k % SYMMETRIES if problem.prior.symmetric else 0
        denoised = turn_back(problem.denoise(turn_image(state.x, turn), s), turn)
        x = problem.prox(denoised, s / self.lam**0.5)
        if k == self.num_steps - 1 and _untold(problem) and problem.noise_level is not None:
            denoised = torch.where(per_sample(problem.noise_level < end, x) > 0, x, denoised)
        return HQSState(x, denoised), HQSInfo(s)

    def _end(self, problem: Problem, x: Tensor) -> Tensor:
        """The last level of each row, (B,)."""
        noise = problem.noise_level
        if self.sigma_end is not None or noise is None:
            return x.new_full((len(x),), self.sigma_end or UNKNOWN_NOISE)
        lowest = max(LOWEST, problem.prior.sigma_min)
        if _untold(problem):
            return (0.4 * noise).clamp(lowest, UNKNOWN_NOISE).to(x)
        share = 1.0 if problem.gaussian else UNEVEN
        return (share * noise).clamp(lowest, self.sigma_start).to(x)

    def estimate(self, state: HQSState) -> Tensor:
        return state.denoised


def _incomplete(problem: Problem) -> bool:
    """Whether entries of x are not measured at all."""
    return problem.likelihood is not None and problem.likelihood.known is not None


def _untold(problem: Problem) -> bool:
    """Whether y may tell nothing of entries of x: these are not measured, or clipped."""
    return _incomplete(problem) or problem.own_data_step


def _continued(problem: Problem) -> Tensor:
    """A first guess where pixels are missing: the others, continued smoothly. A grey start stays in wide holes."""
    assert problem.likelihood is not None
    y, known = problem.y, problem.likelihood.known
    shape = problem.data_shape
    images = len(shape) == 3 and y.shape[2:] == shape[1:] and not y.is_complex()
    if known is None or not images or len(known) != 1 or y.shape[1] not in (1, shape[0]):
        return problem.blank_estimate()
    if not bool((known == known[:, :1]).all()):
        return problem.blank_estimate()
    filled = harmonic_extension(y / per_sample(problem.gain(), y), known[0, :1])
    return problem.prior.to_normalised(filled.expand(-1, shape[0], -1, -1).clone())
