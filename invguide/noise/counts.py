"""Laws of counted quanta: Poisson, and Poisson with the Gaussian noise of the reading."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from invguide.errors import InputError
from invguide.noise.model import NoiseModel, fitted, number

LEAST_RATE = 1e-2  # counts; below, log rate goes on as a straight line
LEAST_VARIANCE = 0.1  # counts; of residuals, so that one count where none was expected is three deviations, not ten
SUMMED = 2.0  # counts; of reading noise, below which counts are summed over and not shifted
REACH = 6.0  # standard deviations of the reading noise, of the counts that are summed over


class CountingLaw(NoiseModel):
    """What laws of counts share: a transform after which their noise is nearly Gaussian, of standard deviation 1.

    The generalised Anscombe transform and the closed form of its exact unbiased inverse: Makitalo and Foi 2013,
    "Optimal inversion of the generalized Anscombe transformation for Poisson-Gaussian noise", doi
    10.1109/TIP.2012.2202675, eqs. 1 and 9.
    """

    gain: Tensor

    def reading(self) -> Tensor | float:
        """Standard deviation of the noise of the reading, in counts."""
        return 0.0

    def stabilise(self, y: Tensor) -> Tensor:
        """2 sqrt(k + 3/8 + r^2) of k = y / gain counts read with noise r; 0 where the root is of less than 0."""
        return 2 * (y / self.gain + 0.375 + self.reading() ** 2).clamp_min(0.0).sqrt()

    def unstabilise(self, z: Tensor) -> Tensor:
        """The A x at which z is the expectation of `stabilise(y)`, at least 0."""
        z, root = z.clamp_min(2 * 0.375**0.5), 1.5**0.5
        counts = z**2 / 4 + root / (4 * z) - 11 / (8 * z**2) + 5 * root / (8 * z**3) - 0.125
        return self.gain * (counts - self.reading() ** 2).clamp_min(0.0)

    @property
    def even(self) -> bool:
        """Whether each measurement has one gain, and one noise of the reading."""
        return all(getattr(self, name)[0].numel() == 1 for name in self.tensors)


class Counts(NamedTuple):
    """A picture that was counted itself, in normalised units with noise of one level, and the way back."""

    law: CountingLaw
    scale: float  # A x = scale * x
    dark: Tensor  # what a black signal becomes, (B, 1, ...)
    half: Tensor  # half of the way from there to a white one

    @property
    def level(self) -> Tensor:
        """The noise of `stabilise(y)`, (B,), normalised units."""
        return 1 / self.half.flatten()

    def stabilise(self, y: Tensor) -> Tensor:
        """Of black signals -1, of white ones 1."""
        return (self.law.stabilise(y) - self.dark) / self.half - 1

    def unstabilise(self, z: Tensor) -> Tensor:
        """Signals in data units."""
        return self.law.unstabilise((z + 1) * self.half + self.dark) / self.scale


class Poisson(CountingLaw):
    """y = gain * Poisson(A x / gain): counts scaled back to the units of A x.

    Exact for rates of 0.01 counts and more. Below, where solvers come and measurements do not, log rate goes on as its
    tangent and a negative rate r costs r^2 / 2: the log density of k counts has its maximum at the rate k, for k = 0
    at 0, and leads back from anywhere.

    Args:
        gain: Measurement units per count, above 0: a number, one value per element, or a tensor that broadcasts to y,
            such as (B, 1, 1, 1).

    Raises:
        InputError: A gain that is not positive, negative or complex y.
        ShapeError: A gain that does not fit y.
    """

    reweightings = 1  # Fisher scoring: converged, dark pixels are drawn to their mode and lose
    tensors = ("gain",)

    def __init__(self, gain: Tensor | float) -> None:
        self.gain = checked_gain(gain, "Poisson")

    def bind(self, y: Tensor) -> Poisson:
        if y.is_complex() or bool((y < 0).any()):
            raise InputError(
                "Poisson noise: y has negative or complex values; expected non-negative counts * gain. With noise of "
                "the reading: PoissonGaussian(gain, sigma_y)"
            )
        return self._with(gain=fitted(self.gain, y, "the gain of Poisson"))

    def log_density(self, predicted: Tensor, y: Tensor) -> Tensor:
        return log_counts(y / self.gain, predicted / self.gain).flatten(1).sum(1)

    def local_sigma(self, predicted: Tensor, y: Tensor) -> Tensor:
        return self.sigma(predicted, y)

    def sigma(self, predicted: Tensor, y: Tensor) -> Tensor:
        """Of at least 0.1 counts: what is darker still tells nothing in proportion."""
        rate = predicted.detach() / self.gain
        return self.gain * rate.clamp_min(LEAST_VARIANCE).sqrt()

    def squares(self, predicted: Tensor, y: Tensor) -> Tensor:
        """With what the floor of sigma takes away from the expectation, so that it is 1 at the truth."""
        rate = predicted / self.gain
        lacking = (1 - rate / LEAST_VARIANCE).clamp(0.0, 1.0)
        return ((y - predicted) / self.sigma(predicted, y)) ** 2 + lacking


class PoissonGaussian(CountingLaw):
    """y = gain * Poisson(A x / gain) + sigma_y n: photons, and the noise of reading them out.

    Where sigma_y is at most 2 gains, the density is summed over the counts within 6 sigma_y of y. Above, counts are
    not told apart and y + sigma_y^2 / gain is taken as Poisson of rate A x / gain + (sigma_y / gain)^2, which has the
    same mean and variance (Snyder, Hammoud, White 1993, "Image recovery from data acquired with a charge-coupled-device
    camera", doi 10.1364/JOSAA.10.001014).

    Args:
        gain: Measurement units per count, above 0; shapes as for `Poisson`.
        sigma_y: Standard deviation of the reading noise, measurement units, above 0; shapes likewise.

    Raises:
        InputError: Either is not positive, complex y.
        ShapeError: Either does not fit y.
    """

    reweightings = 1  # Fisher scoring: converged, dark pixels are drawn to their mode and lose
    tensors = ("gain", "sigma_y")

    def __init__(self, gain: Tensor | float, sigma_y: Tensor | float) -> None:
        self.gain = checked_gain(gain, "PoissonGaussian")
        self.sigma_y = number(sigma_y)
        if not bool((self.sigma_y > 0).all()):
            raise InputError(
                f"PoissonGaussian: sigma_y is {self.sigma_y.min().item():g}; expected a positive number, or "
                "Poisson(gain) for counts without reading noise"
            )

    def bind(self, y: Tensor) -> PoissonGaussian:
        if y.is_complex():
            raise InputError("PoissonGaussian: y is complex; expected real values")
        gain, sigma = (fitted(v, y, "PoissonGaussian") for v in (self.gain, self.sigma_y))
        return self._with(gain=gain, sigma_y=sigma)

    def reading(self) -> Tensor:
        return self.sigma_y / self.gain

    def log_density(self, predicted: Tensor, y: Tensor) -> Tensor:
        rate, counts, spread = predicted / self.gain, y / self.gain, self.sigma_y / self.gain
        largest = float(spread.max())
        if largest > SUMMED:
            counts = (counts + spread**2).clamp_min(0.0)
            return log_counts(counts, rate + spread**2).flatten(1).sum(1)
        # y far below 0 is next to no count: those from 0 on stand for it.
        nearest, half = counts.detach().round().clamp_min(0.0), math.ceil(REACH * largest) + 1
        terms = []
        for step in range(-half, half + 1):
            k = nearest + step
            kept = k.clamp_min(0.0)
            reading = -0.5 * ((counts - k) / spread) ** 2 - torch.lgamma(kept + 1)
            reading = torch.where(k >= 0, reading, -torch.inf)
            terms.append(log_counts(kept, rate) + reading)
        return torch.stack(terms).logsumexp(0).flatten(1).sum(1)

    def local_sigma(self, predicted: Tensor, y: Tensor) -> Tensor:
        return self.sigma(predicted, y)

    def sigma(self, predicted: Tensor, y: Tensor) -> Tensor:
        return (self.gain * predicted.detach().clamp_min(0.0) + self.sigma_y**2).sqrt()


def log_counts(counts: Tensor, rate: Tensor) -> Tensor:
    """counts log rate - rate of each entry, for rate >= 0.01; below, see `Poisson`."""
    below = (rate - LEAST_RATE).clamp_max(0.0)
    log_rate = rate.clamp_min(LEAST_RATE).log() + below / LEAST_RATE
    negative = rate.clamp_max(0.0)
    return counts * log_rate - rate.clamp_min(0.0) - 0.5 * negative**2


def checked_gain(gain: Tensor | float, law: str) -> Tensor:
    value = number(gain)
    if not bool((value > 0).all()):
        raise InputError(
            f"{law} gain is {value.min().item():g}; expected a positive number (measurement units per count)"
        )
    return value
