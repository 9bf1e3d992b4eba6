"""A Gaussian prior: the smallest case in which everything is known in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from invguide.arguments.rules import Scale
from invguide.errors import ShapeError
from invguide.forward_operator import LinearOperator
from invguide.numerics.linear import per_sample
from invguide.prior import Prior
from invguide.priors.exact.algebra import (
    Array,
    as_double,
    check_samples,
    densify,
    eigen,
    generator,
    kalman,
    noise_range,
    normal,
)


class Gaussian(Prior):
    """N(mean, covariance), with its exact denoiser D = m + C (C + sigma^2 I)^-1 (x - m).

    Works in the eigenbasis of C, so that any noise level costs two products of a vector with a
    (d, d) matrix. Computes in float64 until moved with `.to(...)`.

    Args:
        mean: Normalised units; shape (d,), or the shape of one sample, d then being its number of entries.
        covariance: Normalised units squared, (d, d), symmetric positive definite.
        scale: Data units of one normalised unit, not 0: data = scale * normalised + shift. Default 1.0; that of your
            data.
        shift: Of normalised 0, data units. Default 0.0; that of your data.

    Raises:
        ShapeError: If covariance is not (d, d).
        InputError: If covariance is not symmetric positive definite, or something is not finite.

    Example:
        >>> Gaussian([0.0, 0.0], [[1.0, 0.0], [0.0, 3.0]]).denoise(torch.ones(1, 2).double(), 1.0)
        tensor([[0.5000, 0.7500]], dtype=torch.float64)
    """

    mean: Tensor
    covariance: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor

    def __init__(
        self, mean: Array, covariance: Array, *, scale: Scale = 1.0, shift: float = 0.0
    ) -> None:
        super().__init__()
        mean, covariance = as_double(mean, "mean"), as_double(covariance, "covariance")
        d = mean.numel()
        if mean.ndim == 0 or covariance.shape != (d, d):
            raise ShapeError(
                f"mean {tuple(mean.shape)} has {d} entries, so covariance must be ({d}, {d}); "
                f"got {tuple(covariance.shape)}."
            )
        values, vectors = eigen(covariance)
        self.shape = tuple(mean.shape)
        self.scale, self.shift = scale, shift
        for name, tensor in (("mean", mean), ("covariance", covariance)):
            self.register_buffer(name, tensor)
        self.register_buffer("eigenvalues", values)
        self.register_buffer("eigenvectors", vectors)
        flat = mean.flatten()
        second_moment = covariance + torch.outer(flat, flat)
        top = float(torch.linalg.eigvalsh(second_moment)[-1])
        self.sigma_min, self.sigma_max = noise_range(top, float(values[0]))
        self.sigma_data = float(second_moment.diagonal().mean().sqrt())

    @property
    def std(self) -> Tensor:
        """Standard deviation of each entry, shape of one sample."""
        return self.covariance.diagonal().sqrt().reshape(self.mean.shape)

    def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
        check_samples(self, x, condition)
        z, level = self._project(x, sigma)
        kept = self.eigenvalues / (self.eigenvalues + level) * z
        return (kept @ self.eigenvectors.mT + self.mean.flatten()).reshape(x.shape).to(x.dtype)

    def score(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
        """Return grad log p(x; sigma), shape of x; sigma = 0 is allowed."""
        check_samples(self, x, condition)
        z, level = self._project(x, sigma)
        pull = z / (self.eigenvalues + level)
        return -(pull @ self.eigenvectors.mT).reshape(x.shape).to(x.dtype)

    def log_prob(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        """Return log p(x; sigma) of x0 + sigma n, (B, *shape) -> (B,)."""
        check_samples(self, x, {})
        z, level = self._project(x, sigma)
        variance = self.eigenvalues + level
        return -0.5 * (z**2 / variance + (2 * math.pi * variance).log()).sum(-1).to(x.dtype)

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Draw n clean signals, (n, *shape), normalised units."""
        noise = normal((n, len(self.eigenvalues)), generator(seed, torch.device("cpu")), self.mean)
        # The symmetric root: eigenvectors of equal eigenvalues are anything, and a rounding error would turn the draw.
        draws = noise @ self.eigenvectors * self.eigenvalues.sqrt() @ self.eigenvectors.mT
        return draws.reshape(n, *self.mean.shape) + self.mean

    def posterior(self, A: Tensor | LinearOperator, y: Array, sigma_y: float) -> Gaussian:
        """Return p(x | y) for y = A x + sigma_y n, exact (Rasmussen & Williams 2006, A.6).

        Args:
            A: Matrix (m, d) on the flattened signal, or a LinearOperator, which is made dense.
            y: One measurement, with or without a batch axis of one; complex counts as pairs.
            sigma_y: Noise standard deviation of each real number, measurement units; positive.
        """
        measurement = densify(self, A, y, sigma_y)
        gain, covariance, _ = kalman(self.covariance, measurement)
        mean = self.mean.flatten()
        mean = mean + gain @ (measurement.y - measurement.matrix @ mean)
        units = {"scale": self.scale, "shift": self.shift}
        return Gaussian(mean.reshape(self.mean.shape), covariance, **units)

    def _project(self, x: Tensor, sigma: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return x - m in the eigenbasis (B, d), and sigma^2 as () or (B, 1)."""
        x = x.to(self.mean.dtype).flatten(1)
        return (x - self.mean.flatten()) @ self.eigenvectors, per_sample(sigma, x) ** 2
