"""Laws of the measurement given its noiseless value: log p(y | A x), per sample, up to a constant in x."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from invguide.errors import InputError, ShapeError
from invguide.truncated_normal import log_mass, standard_mean

EXACT_FRACTION = 1e-3
LEAST_SLOPE = 1e-2  # of a rounding step


class NoiseModel(ABC):
    """One law; `bind` fixes it to a batch of measurements, `rows` selects some of them."""

    @abstractmethod
    def bind(self, y: Tensor) -> NoiseModel:
        """Check the parameters against y (B, *y_shape) and return a law whose tensors have a batch axis of B."""

    @abstractmethod
    def log_density(self, predicted: Tensor, y: Tensor) -> Tensor:
        """(B, *y_shape) twice -> (B,)."""

    @abstractmethod
    def sigma(self, predicted: Tensor, y: Tensor) -> Tensor | None:
        """Standard deviation of y around `predicted`, broadcastable to y; None where the law does not tell."""

    def square(self, log_density: Tensor, predicted: Tensor, y: Tensor) -> Tensor:
        """Sum of |y - predicted|^2 / sigma^2 over a measurement, (B,); NaN where the law tells no sigma."""
        sigma = self.sigma(predicted, y)
        if sigma is None:
            return torch.full_like(log_density, float("nan"))
        return (((y - predicted) / sigma).abs() ** 2).flatten(1).sum(1)

    def rows(self, index: Tensor) -> NoiseModel:
        return self

    def to(self, device: torch.device | str, dtype: torch.dtype) -> NoiseModel:
        return self


class Gaussian(NoiseModel):
    """y = A x + sigma_y n. For complex y, sigma_y is the standard deviation of each of the two parts.

    Args:
        sigma_y: In measurement units: a number, one value per element (shape of one measurement), or a tensor of
            y's rank that broadcasts to y, such as (B, 1, 1, 1). Zero means exact data, solved as noise of
            0.1 % of the measurement's root mean square, with a warning.
    """

    def __init__(self, sigma_y: Tensor | float) -> None:
        self.sigma_y = _number(sigma_y)

    def bind(self, y: Tensor) -> Gaussian:
        sigma = self.sigma_y.detach()
        if not bool(torch.isfinite(sigma).all()) or bool((sigma < 0).any()):
            worst = sigma.flatten()[(~torch.isfinite(sigma) | (sigma < 0)).flatten()][0].item()
            raise InputError(
                f"sigma_y is {worst:g}; expected a noise standard deviation >= 0 in the units of the measurement"
            )
        sigma = _fitted(sigma, y, "sigma_y")
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
        bound = Gaussian.__new__(Gaussian)
        bound.sigma_y = sigma.contiguous()
        return bound

    def log_density(self, predicted: Tensor, y: Tensor) -> Tensor:
        scaled = (y - predicted) / self.sigma_y
        square = scaled.real**2 + scaled.imag**2 if scaled.is_complex() else scaled**2
        return -0.5 * square.flatten(1).sum(1)

    def square(self, log_density: Tensor, predicted: Tensor, y: Tensor) -> Tensor:
        return -2 * log_density

    def sigma(self, predicted: Tensor, y: Tensor) -> Tensor:
        return self.sigma_y

    def rows(self, index: Tensor) -> Gaussian:
        part = Gaussian.__new__(Gaussian)
        part.sigma_y = self.sigma_y[index]
        return part

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Gaussian:
        moved = Gaussian.__new__(Gaussian)
        moved.sigma_y = self.sigma_y.to(device=device, dtype=dtype)
        return moved


class Poisson(NoiseModel):
    """y = gain * Poisson(A x / gain): counts scaled back to the units of A x.

    The rate is held at no less than 1 % of one count, where the logarithm would otherwise diverge; A x below that
    (which a solver visits, a measurement does not) keeps a gradient through the linear term.
    """

    def __init__(self, gain: float) -> None:
        if not gain > 0:
            raise InputError(
                f"Poisson gain is {gain:g}; expected a positive number (measurement units per count)"
            )
        self.gain = float(gain)

    def bind(self, y: Tensor) -> Poisson:
        if y.is_complex() or bool((y < 0).any()):
            raise InputError(
                "Poisson noise: y has negative or complex values; expected non-negative counts * gain"
            )
        return self

    def log_density(self, predicted: Tensor, y: Tensor) -> Tensor:
        rate = predicted / self.gain
        return (torch.xlogy(y / self.gain, rate.clamp_min(1e-2)) - rate).flatten(1).sum(1)

    def sigma(self, predicted: Tensor, y: Tensor) -> Tensor:
        return (self.gain * predicted.detach().clamp_min(1e-2 * self.gain)).sqrt()


class Quantised(NoiseModel):
    """y = step * round((A x + sigma_y n) / step): A x + sigma_y n lies within half a step of y.

    log p(y | A x) = log [Phi((y + step/2 - A x) / sigma_y) - Phi((y - step/2 - A x) / sigma_y)]: flat inside of the
    step, and as steep outside as a Gaussian. A grid that does not go through 0 is y's own: only y counts.

    Args:
        step: Width of a step, measurement units: a number, one value per element, or a tensor that broadcasts to y.
        sigma_y: Gaussian noise before the rounding, as `step`; at least 1 % of the step is taken, so that the law
            has a slope everywhere.

    Raises:
        InputError: A step that is not positive, a sigma_y that is negative, complex y.
        ShapeError: Either does not fit y.
    """

    def __init__(self, step: Tensor | float, sigma_y: Tensor | float = 0.0) -> None:
        self.step, self.sigma_y = _number(step), _number(sigma_y)

    def bind(self, y: Tensor) -> Quantised:
        if y.is_complex():
            raise InputError("Quantised: y is complex; expected real values, the two parts apart")
        step, sigma = (_fitted(v, y, "Quantised") for v in (self.step, self.sigma_y))
        if not bool((step > 0).all()) or not bool((sigma >= 0).all()):
            raise InputError(
                f"Quantised: step is at least {step.min().item():g} and sigma_y {sigma.min().item():g}; expected a "
                "step > 0 and a sigma_y >= 0"
            )
        return self._of(step, torch.maximum(sigma, LEAST_SLOPE * step))

    @classmethod
    def _of(cls, step: Tensor, sigma_y: Tensor) -> Quantised:
        law = cls.__new__(cls)
        law.step, law.sigma_y = step, sigma_y
        return law

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

    def square(self, log_density: Tensor, predicted: Tensor, y: Tensor) -> Tensor:
        """NaN: a value anywhere in its step agrees with y as well as any other."""
        return torch.full_like(log_density, float("nan"))

    def agreement(self, predicted: Tensor, y: Tensor) -> Tensor:
        """Which part of a measurement lies in its step, give or take two sigma_y, (B,)."""
        inside = (y - predicted).abs() <= self.step / 2 + 2 * self.sigma_y
        return inside.flatten(1).double().mean(1)

    def rows(self, index: Tensor) -> Quantised:
        return self._of(self.step[index], self.sigma_y[index])

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Quantised:
        moved = (v.to(device=device, dtype=dtype) for v in (self.step, self.sigma_y))
        return self._of(*moved)


class LogDensity(NoiseModel):
    """The user's own log p(y | A x): a callable (predicted (B, *y_shape), y) -> (B,), differentiable or not."""

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


def _number(value: Tensor | float) -> Tensor:
    return torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float64)


def _fitted(value: Tensor, y: Tensor, name: str) -> Tensor:
    """A number, a value per element of one measurement, or what broadcasts to y (B, ...), as rows of y's rank."""
    value = value.detach().to(device=y.device, dtype=y.real.dtype)
    given = tuple(value.shape)
    if value.shape == y.shape[1:] and value.ndim:
        value = value[None]
    try:
        # numpy's: torch's takes a second to import sympy.
        fits = value.ndim in (0, y.ndim) and np.broadcast_shapes(value.shape, y.shape) == y.shape
    except ValueError:
        fits = False
    if not fits:
        raise ShapeError(
            f"{name} has shape {given}; expected a number, one value per element {tuple(y.shape[1:])}, or a shape of "
            f"{y.ndim} axes that broadcasts to y {tuple(y.shape)}"
        )
    if value.ndim:
        return value.expand(len(y), *value.shape[1:])
    return value.expand(len(y)).reshape(-1, *(1,) * (y.ndim - 1))
