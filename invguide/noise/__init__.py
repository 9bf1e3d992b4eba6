"""Laws of the measurement given its noiseless value: log p(y | A x), per sample, up to a constant in x.

Gaussian, CorrelatedGaussian, BlockGaussian, LowRankGaussian; Poisson, PoissonGaussian; Laplace, StudentT; Rician;
Uniform, Quantised; LogDensity for a function of one's own. Entries of y that are missing are told by `mask`, see
`invguide.solve`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from invguide.errors import InputError, ShapeError
from invguide.noise.blocks import BlockGaussian
from invguide.noise.counts import CountingLaw, Poisson, PoissonGaussian
from invguide.noise.covariance import CorrelatedGaussian, LowRankGaussian
from invguide.noise.model import GaussianLaw, NoiseModel, fitted, number
from invguide.noise.tails import Laplace, Rician, StudentT
from invguide.numerics.truncated_normal import log_mass, standard_mean

__all__ = [
    "BlockGaussian",
    "CorrelatedGaussian",
    "CountingLaw",
    "Gaussian",
    "GaussianLaw",
    "Laplace",
    "LogDensity",
    "LowRankGaussian",
    "NoiseModel",
    "Poisson",
    "PoissonGaussian",
    "Quantised",
    "Rician",
    "StudentT",
    "Uniform",
]

EXACT_FRACTION = 1e-3
LEAST_SLOPE = 1e-2  # of a rounding step


class Gaussian(GaussianLaw):
    """y = A x + sigma_y n. For complex y, sigma_y is the standard deviation of each of the two parts.

    Args:
        sigma_y: In measurement units: a number, one value per element (shape of one measurement), or a tensor of
            y's rank that broadcasts to y, such as (B, 1, 1, 1). Zero means exact data, solved as noise of
            0.1 % of the measurement's root mean square, with a warning.
    """

    tensors = ("sigma_y",)

    def __init__(self, sigma_y: Tensor | float) -> None:
        self.sigma_y = number(sigma_y)

    def bind(self, y: Tensor) -> Gaussian:
        sigma = self.sigma_y.detach()
        if not bool(torch.isfinite(sigma).all()) or bool((sigma < 0).any()):
            worst = sigma.flatten()[(~torch.isfinite(sigma) | (sigma < 0)).flatten()][0].item()
            raise InputError(
                f"sigma_y is {worst:g}; expected a noise standard deviation >= 0 in the units of the measurement"
            )
        sigma = fitted(sigma, y, "sigma_y")
        if bool((sigma == 0).any()):
            rms = (
                (y.abs() ** 2)
                .flatten(1)
                .mean(1)
                .sqrt()
                .to(sigma.dtype)
                .reshape(-1, *(1,) * (y.ndim - 1))
            )
            floor = EXACT_FRACTION * torch.where(rms > 0, rms, torch.ones_like(rms))
            warnings.warn(
                f"sigma_y is 0 (exact data): solved as Gaussian noise of {floor.flatten()[0].item():.2g}, "
                f"{EXACT_FRACTION:.1%} of the measurement's root mean square",
                stacklevel=2,
            )
            sigma = torch.where(sigma == 0, floor, sigma)
        return self._with(sigma_y=sigma.contiguous())

    @classmethod
    def bound(cls, sigma_y: Tensor) -> Gaussian:
        """The law of checked standard deviations, (B, ...), which broadcast to y."""
        return cls(0.0)._with(sigma_y=sigma_y)

    def whiten(self, residual: Tensor) -> Tensor:
        return residual / self.sigma_y

    def whiten_adjoint(self, u: Tensor) -> Tensor:
        return u / self.sigma_y

    @property
    def one_sigma(self) -> Tensor | None:
        return self.sigma_y.flatten() if self.sigma_y[0].numel() == 1 else None

    def sigma(self, predicted: Tensor, y: Tensor) -> Tensor:
        return self.sigma_y


class Quantised(NoiseModel):
    """y = step * round((A x + sigma_y n) / step): A x + sigma_y n lies within half a step of y.

    log p(y | A x) = log [Phi((y + step/2 - A x) / sigma_y) - Phi((y - step/2 - A x) / sigma_y)]: flat inside of the
    step, and as steep outside as a Gaussian. A grid that does not go through 0 is y's own: only y counts.

    Args:
        step: Width of a step, measurement units, above 0: a number, one value per element, or a tensor that broadcasts
            to y.
        sigma_y: Standard deviation of Gaussian noise before the rounding, as `step`; at least 1 % of the step is taken,
            so that the law has a slope everywhere. Default 0.0, rounding alone; that of the sensor, where it is known.

    Raises:
        InputError: A step that is not positive, a sigma_y that is negative, complex y.
        ShapeError: Either does not fit y.
    """

    tensors = ("step", "sigma_y")

    def __init__(self, step: Tensor | float, sigma_y: Tensor | float = 0.0) -> None:
        self.step, self.sigma_y = number(step), number(sigma_y)

    def bind(self, y: Tensor) -> Quantised:
        name = type(self).__name__
        if y.is_complex():
            raise InputError(f"{name}: y is complex; expected real values, the two parts apart")
        step, sigma = (fitted(v, y, name) for v in (self.step, self.sigma_y))
        if not bool((step > 0).all()) or not bool((sigma >= 0).all()):
            raise InputError(
                f"{name}: step is at least {step.min().item():g} and sigma_y {sigma.min().item():g}; expected a "
                "step > 0 and a sigma_y >= 0"
            )
        return self._with(step=step, sigma_y=torch.maximum(sigma, LEAST_SLOPE * step))

    def log_density(self, predicted: Tensor, y: Tensor) -> Tensor:
        a, b = self._ends(predicted, y, self.sigma_y)
        return log_mass(a, b).flatten(1).sum(1).to(predicted.dtype)

    def posterior_mean(self, mean: Tensor, variance: Tensor, y: Tensor) -> Tensor:
        """E[c | y] of values c = A x that were N(mean, variance) each before y was known; all broadcast to y.

        c + sigma_y n is a Gaussian cut off to the step, whose mean is known in closed form.
        """
        total = variance + self.sigma_y**2
        a, b = self._ends(mean, y, total.sqrt())
        pull = standard_mean(a, b).to(mean.dtype)
        towards = torch.where(y >= mean, 1.0, -1.0)
        return mean + towards * (variance / total.sqrt()) * pull

    def _ends(self, predicted: Tensor, y: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """The ends a <= b of the step in standard deviations from `predicted`, |a| <= b; float64."""
        distance, half = (y - predicted).abs().double(), self.step.double() / 2
        std = std.double()
        return (distance - half) / std, (distance + half) / std

    def sigma(self, predicted: Tensor, y: Tensor) -> Tensor:
        return (self.step**2 / 12 + self.sigma_y**2).sqrt()

    def squares(self, predicted: Tensor, y: Tensor) -> Tensor | None:
        """None: a value anywhere in its step agrees with y as well as any other."""
        return None

    def agreement(self, predicted: Tensor, y: Tensor) -> Tensor:
        """Which part of a measurement lies in its step, give or take two sigma_y, (B,)."""
        inside = (y - predicted).abs() <= self.step / 2 + 2 * self.sigma_y
        return inside.flatten(1).double().mean(1)


class Uniform(Quantised):
    """y = A x + u + sigma_y n, u uniform between -half_width and half_width: deepinv's UniformNoise, fine rounding.

    The density is that of `Quantised` with a step of 2 half_width; here u does not depend on the signal, so that the
    residual has a variance, half_width^2 / 3 + sigma_y^2, and chi2 is near 1 for the truth.

    Args:
        half_width: Measurement units, above 0: a number, one value per element, or a tensor that broadcasts to y.
        sigma_y: Standard deviation of Gaussian noise besides, as `half_width`; at least 2 % of it is taken. Default
            0.0, none.
    """

    def __init__(self, half_width: Tensor | float, sigma_y: Tensor | float = 0.0) -> None:
        super().__init__(2 * number(half_width), sigma_y)

    def squares(self, predicted: Tensor, y: Tensor) -> Tensor | None:
        return ((y - predicted) / self.sigma(predicted, y)) ** 2


class LogDensity(NoiseModel):
    """The user's own log p(y | A x): a callable (predicted (B, *y_shape), y) -> (B,), differentiable or not.

    Args:
        log_density: Of (predicted (B, *y_shape), y (B, *y_shape)) -> (B,), natural logarithm, up to a constant in
            predicted.
    """

    def __init__(self, log_density: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._log_density = log_density

    def bind(self, y: Tensor) -> LogDensity:
        return self

    def log_density(self, predicted: Tensor, y: Tensor) -> Tensor:
        value = self._log_density(predicted, y)
        if not isinstance(value, Tensor) or value.shape != (len(y),):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ShapeError(
                f"the log density returned {got}; expected one value per sample, shape ({len(y)},)"
            )
        return value

    def sigma(self, predicted: Tensor, y: Tensor) -> None:
        return None
