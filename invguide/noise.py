"""Laws of the measurement given its noiseless value: log p(y | A x), per sample, up to a constant in x."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from invguide.errors import InputError, ShapeError

EXACT_FRACTION = 1e-3


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
        self.sigma_y = torch.as_tensor(
            sigma_y, dtype=None if isinstance(sigma_y, Tensor) else torch.float64
        )

    def bind(self, y: Tensor) -> Gaussian:
        sigma = self.sigma_y.detach().to(device=y.device, dtype=y.real.dtype)
        if not bool(torch.isfinite(sigma).all()) or bool((sigma < 0).any()):
            worst = sigma.flatten()[(~torch.isfinite(sigma) | (sigma < 0)).flatten()][0].item()
            raise InputError(
                f"sigma_y is {worst:g}; expected a noise standard deviation >= 0 in the units of the measurement"
            )
        if sigma.shape == y.shape[1:] and sigma.ndim:
            sigma = sigma[None]
        try:
            # numpy's: torch's takes a second to import sympy.
            fits = (
                sigma.ndim in (0, y.ndim) and np.broadcast_shapes(sigma.shape, y.shape) == y.shape
            )
        except ValueError:
            fits = False
        if not fits:
            raise ShapeError(
                f"sigma_y has shape {tuple(self.sigma_y.shape)}; expected a number, one value per element "
                f"{tuple(y.shape[1:])}, or a shape of {y.ndim} axes that broadcasts to y {tuple(y.shape)}"
            )
        sigma = (
            sigma.expand(len(y), *sigma.shape[1:])
            if sigma.ndim
            else sigma.expand(len(y)).reshape(-1, *(1,) * (y.ndim - 1))
        )
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
