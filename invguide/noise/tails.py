"""Laws with heavier tails than a Gaussian, and that of the magnitude of a complex number."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from invguide.errors import InputError
from invguide.noise.model import NoiseModel, fitted, number

LEAST_DISTANCE = 1e-2  # scales; nearer to the kink of Laplace, its slope is that of a Gaussian


class Laplace(NoiseModel):
    """y = A x + n, log p(n) = -|n| / scale: sparse large errors. Complex y: each of the two parts.

    chi2 is the mean of |y - A x| / scale.

    Args:
        scale: Mean of |n|, measurement units, above 0; the standard deviation is sqrt(2) scale. A number, one value
            per element, or a tensor that broadcasts to y.

    Raises:
        InputError: It is not positive.
        ShapeError: It does not fit y.
    """

    tensors = ("scale",)
    reweightings = 12

    def __init__(self, scale: Tensor | float) -> None:
        self.scale = positive(scale, "Laplace", "scale")

    def bind(self, y: Tensor) -> Laplace:
        return self._with(scale=fitted(self.scale, y, "the scale of Laplace"))

    def log_density(self, predicted: Tensor, y: Tensor) -> Tensor:
        return -self.squares(predicted, y).flatten(1).sum(1)

    def sigma(self, predicted: Tensor, y: Tensor) -> Tensor:
        return math.sqrt(2) * self.scale

    def local_sigma(self, predicted: Tensor, y: Tensor) -> Tensor:
        distance = (y - predicted).abs() / self.scale
        return self.scale * distance.clamp_min(LEAST_DISTANCE).sqrt()

    def squares(self, predicted: Tensor, y: Tensor) -> Tensor:
        return _parts((y - predicted) / self.scale).abs().sum(-1)


class StudentT(NoiseModel):
    """y = A x + scale t, t of Student's distribution with dof degrees of freedom: outliers. Complex y: each part.

    chi2 is the mean of w |r|^2, r = (y - A x) / scale, with the weights w = (dof + 1) / (dof + r^2) of Lange, Little,
    Taylor 1989, "Robust statistical modeling using the t distribution", doi 10.1080/01621459.1989.10478852: its
    expectation is 1 at the truth for any dof, also where the noise has no variance.

    Args:
        scale: Measurement units, above 0: a number, one value per element, or a tensor that broadcasts to y.
        dof: Degrees of freedom, above 0, likewise. Default 3.0; lower for more outliers (1 is Cauchy's law), higher for
            fewer.

    Raises:
        InputError: Either is not positive.
        ShapeError: Either does not fit y.
    """

    tensors = ("scale", "dof")
    reweightings = 12

    def __init__(self, scale: Tensor | float, dof: Tensor | float = 3.0) -> None:
        self.scale = positive(scale, "StudentT", "scale")
        self.dof = positive(dof, "StudentT", "dof")

    def bind(self, y: Tensor) -> StudentT:
        scale, dof = (fitted(v, y, "StudentT") for v in (self.scale, self.dof))
        return self._with(scale=scale, dof=dof)

    def log_density(self, predicted: Tensor, y: Tensor) -> Tensor:
        r, dof = _parts((y - predicted) / self.scale), self.dof[..., None]
        return -0.5 * ((dof + 1) * torch.log1p(r**2 / dof)).flatten(1).sum(1)

    def sigma(self, predicted: Tensor, y: Tensor) -> Tensor | None:
        if not bool((self.dof > 2).all()):
            return None
        return self.scale * (self.dof / (self.dof - 2)).sqrt()

    def local_sigma(self, predicted: Tensor, y: Tensor) -> Tensor:
        square = ((y - predicted).abs() / self.scale) ** 2
        return self.scale * ((self.dof + square) / (self.dof + 1)).sqrt()

    def squares(self, predicted: Tensor, y: Tensor) -> Tensor:
        r, dof = _parts((y - predicted) / self.scale), self.dof[..., None]
        return ((dof + 1) * r**2 / (dof + r**2)).sum(-1)


class Rician(NoiseModel):
    """y = |A x + n|, n complex normal with sigma_y in each of its two parts: magnitude images, as of MRI.

    log p = -(y - a)^2 / (2 sigma_y^2) + log(exp(-z) I0(z)), z = y a / sigma_y^2, a = |A x|; A x may be complex. Only a
    is seen: two signs of A x agree with y alike. Residuals and chi2 are taken from mean and variance of the law, since
    y is above a on average (Gudbjartsson, Patz 1995, doi 10.1002/mrm.1910340618).

    Args:
        sigma_y: Measurement units, above 0: a number, one value per element, or a tensor that broadcasts to y.

    Raises:
        InputError: It is not positive; negative or complex y.
        ShapeError: It does not fit y.
    """

    tensors = ("sigma_y",)

    def __init__(self, sigma_y: Tensor | float) -> None:
        self.sigma_y = positive(sigma_y, "Rician", "sigma_y")

    def bind(self, y: Tensor) -> Rician:
        if y.is_complex() or bool((y < 0).any()):
            raise InputError("Rician noise: y has negative or complex values; expected magnitudes")
        return self._with(sigma_y=fitted(self.sigma_y, y, "sigma_y of Rician"))

    def log_density(self, predicted: Tensor, y: Tensor) -> Tensor:
        a, r = predicted.abs() / self.sigma_y, y / self.sigma_y
        return (torch.special.i0e(a * r).log() - 0.5 * (r - a) ** 2).flatten(1).sum(1)

    def sigma(self, predicted: Tensor, y: Tensor) -> Tensor:
        return self._moments(predicted)[1]

    def whitened(self, predicted: Tensor, y: Tensor) -> Tensor:
        mean, deviation = self._moments(predicted)
        return (y - mean) / deviation

    def _moments(self, predicted: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of y."""
        a = predicted.detach().abs() / self.sigma_y
        half = a**2 / 4
        laguerre = (1 + 2 * half) * torch.special.i0e(half) + 2 * half * torch.special.i1e(half)
        mean = math.sqrt(math.pi / 2) * laguerre
        # 2 + a^2 - mean^2 loses its digits where a is large and the variance 1 - 1 / (2 a^2).
        variance = torch.where(a > 30, 1 - 0.5 / a.clamp_min(1.0) ** 2, 2 + a**2 - mean**2)
        return self.sigma_y * mean, self.sigma_y * variance.sqrt()


def positive(value: Tensor | float, law: str, name: str) -> Tensor:
    """A parameter as a tensor.

    Raises:
        InputError: It is not above 0 and finite everywhere.
    """
    tensor = number(value)
    if not bool(((tensor > 0) & tensor.isfinite()).all()):
        raise InputError(f"{law}: {name} is {tensor.min().item():g}; expected a positive number")
    return tensor


def _parts(values: Tensor) -> Tensor:
    """The real numbers of each value, (B, *y_shape, 1 or 2)."""
    return torch.view_as_real(values) if values.is_complex() else values[..., None]
