"""A Gaussian mixture prior: many modes, and still an exact denoiser and an exact posterior."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from invguide.arguments.rules import Scale
from invguide.errors import InputError, ShapeError
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


class GaussianMixture(Prior):
    """sum_k w_k N(mean_k, C_k), with C shared or one per component.

    The denoiser is sum_k r_k D_k, where D_k is the Gaussian denoiser of component k and r_k, its
    responsibility, is a softmax over log w_k + log N(x; mean_k, C_k + sigma^2 I): no weight is
    ever clamped, so modes far away fade as they should. With a shared covariance one noise level
    costs O(d^2 + K d) per sample, otherwise O(K d^2).

    Args:
        means: Normalised units, (K, d), or (K, *shape of one sample).
        covariance: Normalised units squared, (d, d), or (K, d, d) of each component; symmetric positive definite.
        weights: (K,), positive, summing to 1. Default None: all equal.
        scale: Data units of one normalised unit, not 0: data = scale * normalised + shift. Default 1.0; that of your
            data.
        shift: Of normalised 0, data units. Default 0.0; that of your data.

    Conditions: `label` (B,), the component that a row is known to come from, -1 for unknown.

    Raises:
        ShapeError: If the shapes disagree.
        InputError: If a covariance or the weights are not what they have to be.

    Example:
        >>> GaussianMixture([[-1.0], [1.0]], [[0.1]]).denoise(torch.zeros(1, 1).double(), 1.0)
        tensor([[0.]], dtype=torch.float64)
    """

    means: Tensor
    covariance: Tensor
    log_weights: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor
    _centre: Tensor
    _modes: Tensor

    def __init__(
        self,
        means: Array,
        covariance: Array,
        weights: Array | None = None,
        *,
        scale: Scale = 1.0,
        shift: float = 0.0,
    ) -> None:
        super().__init__()
        means, covariance = as_double(means, "means"), as_double(covariance, "covariance")
        if means.ndim < 2:
            raise ShapeError(f"means must be (K, d), got {tuple(means.shape)}.")
        K, d = len(means), means[0].numel()
        if covariance.shape not in ((d, d), (K, d, d)):
            raise ShapeError(
                f"means {tuple(means.shape)} need a covariance ({d}, {d}) or ({K}, {d}, {d}); "
                f"got {tuple(covariance.shape)}."
            )
        weights = torch.full((K,), 1 / K) if weights is None else as_double(weights, "weights")
        weights = weights.to(means)
        if weights.shape != (K,):
            raise ShapeError(f"weights must be ({K},), one per mean; got {tuple(weights.shape)}.")
        if bool((weights <= 0).any()):
            raise InputError(
                f"weights must be positive; the smallest is {float(weights.min()):.3g}. "
                "Drop components of weight zero."
            )
        if abs(float(weights.sum()) - 1) > 1e-5:
            raise InputError(
                f"weights must sum to 1; they sum to {float(weights.sum()):.6g}. "
                "Divide them by their sum."
            )
        values, vectors = eigen(covariance)
        self.shape = tuple(means.shape[1:])
        self.scale, self.shift = scale, shift
        self.register_buffer("means", means)
        self.register_buffer("covariance", covariance)
        self.register_buffer("log_weights", (weights / weights.sum()).log())
        self.register_buffer("eigenvalues", values)
        self.register_buffer("eigenvectors", vectors)
        # A shared covariance has one eigenbasis: keep the means there, seen from their centre.
        centre = means.flatten(1).mean(0)
        self.register_buffer("_centre", None if self.full else centre)
        self.register_buffer(
            "_modes", None if self.full else (means.flatten(1) - centre) @ vectors
        )
        self._set_levels()

    def _set_levels(self) -> None:
        flat, weights = self.means.flatten(1), self.weights
        within = self.covariance
        if self.full:
            within = torch.einsum("k,kde->de", weights, within)
        second_moment = within + torch.einsum("k,kd,ke->de", weights, flat, flat)
        top = float(torch.linalg.eigvalsh(second_moment)[-1])
        self.sigma_min, self.sigma_max = noise_range(top, float(self.eigenvalues.min()))
        self.sigma_data = float(second_moment.diagonal().mean().sqrt())

    @property
    def full(self) -> bool:
        """Whether every component has a covariance of its own."""
        return self.covariance.ndim == 3

    @property
    def weights(self) -> Tensor:
        """(K,), may round to zero for components that a measurement has ruled out."""
        return self.log_weights.exp()

    @property
    def mean(self) -> Tensor:
        """Mean of the whole mixture, shape of one sample."""
        return torch.einsum("k,k...->...", self.weights, self.means)

    @property
    def std(self) -> Tensor:
        """Standard deviation of each entry under the whole mixture, shape of one sample."""
        within = self.covariance.diagonal(dim1=-2, dim2=-1).reshape(-1, *self.mean.shape)
        spread = within + (self.means - self.mean) ** 2
        return torch.einsum("k,k...->...", self.weights, spread).sqrt()

    def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
        z, variance, log_joint, level = self._components(x, sigma, condition)
        r = log_joint.softmax(-1)
        if self.full:
            kept = (self.eigenvalues[:, None] / variance * z) @ self.eigenvectors.mT
            denoised = torch.einsum("bk,kbd->bd", r, kept + self.means.flatten(1)[:, None])
        else:
            expected = r @ self._modes
            kept = (self.eigenvalues * z + level * expected) / variance
            denoised = kept @ self.eigenvectors.mT + self._centre
        return denoised.reshape(x.shape).to(x.dtype)

    def score(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
        """Return grad log p(x; sigma), shape of x; sigma = 0 is allowed."""
        z, variance, log_joint, _ = self._components(x, sigma, condition)
        r = log_joint.softmax(-1)
        if self.full:
            pull = torch.einsum("bk,kbd->bd", r, (z / variance) @ self.eigenvectors.mT)
        else:
            pull = (z - r @ self._modes) / variance @ self.eigenvectors.mT
        return -pull.reshape(x.shape).to(x.dtype)

    def log_prob(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        """Return log p(x; sigma) of x0 + sigma n, (B, *shape) -> (B,)."""
        return self._components(x, sigma, {})[2].logsumexp(-1).to(x.dtype)

    def responsibilities(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        """Return P(component | x), (B, *shape) -> (B, K)."""
        return self._components(x, sigma, {})[2].softmax(-1).to(x.dtype)

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Draw n clean signals, (n, *shape), normalised units."""
        source = generator(seed, torch.device("cpu"))
        chosen = torch.multinomial(self.weights.cpu(), n, replacement=True, generator=source)
        chosen = chosen.to(self.means.device)
        noise = normal((n, self.eigenvalues.shape[-1]), source, self.means)
        draws = torch.empty_like(noise)
        for k in range(len(self.means)):  # one (d, d) product each, never an (n, d, d) tensor
            rows = chosen == k
            values, vectors = self._eigen(k)
            draws[rows] = noise[rows] @ vectors * values.sqrt() @ vectors.mT  # as Gaussian.sample
        return self.means[chosen] + draws.reshape(n, *self.means.shape[1:])

    def posterior(self, A: Tensor | LinearOperator, y: Array, sigma_y: float) -> GaussianMixture:
        """Return p(x | y) for y = A x + sigma_y n, exact: again a mixture.

        Component k becomes its Gaussian posterior, and its weight is multiplied by the evidence
        N(y; A mean_k, A C_k A^T + sigma_y^2 I). A shared covariance stays shared.

        Args:
            A: Matrix (m, d) on the flattened signal, or a LinearOperator, which is made dense.
            y: One measurement, with or without a batch axis of one; complex counts as pairs.
            sigma_y: Noise standard deviation of each real number, measurement units; positive.
        """
        measurement = densify(self, A, y, sigma_y)
        gain, covariance, factor = kalman(self.covariance, measurement)
        flat = self.means.flatten(1)
        residual = measurement.y - flat @ measurement.matrix.mT
        means = flat + (gain @ residual[..., None])[..., 0]
        white = torch.linalg.solve_triangular(factor, residual[..., None], upper=False)[..., 0]
        volume = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        units = {"scale": self.scale, "shift": self.shift}
        posterior = GaussianMixture(means.reshape(self.means.shape), covariance, **units)
        evidence = self.log_weights - 0.5 * white.square().sum(-1) - volume
        posterior.log_weights = evidence.log_softmax(0)
        posterior._set_levels()
        return posterior

    def _eigen(self, k: int) -> tuple[Tensor, Tensor]:
        if self.full:
            return self.eigenvalues[k], self.eigenvectors[k]
        return self.eigenvalues, self.eigenvectors

    def _components(
        self, x: Tensor, sigma: Tensor | float, condition: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return x in the eigenbasis, its variances there, log w_k + log N_k(x) (B, K), sigma^2.

        Full: eigenbasis of each component about its mean, (K, B, d). Shared: the one eigenbasis
        about the centre, (B, d); the quadratic form is then expanded, which turns a (B, K, d)
        tensor into a product of matrices, and centring keeps the expansion from cancelling.
        """
        label = condition.get("label")
        check_samples(self, x, {k: v for k, v in condition.items() if k != "label"})
        x = x.to(self.means.dtype).flatten(1)
        level = per_sample(sigma, x) ** 2
        if self.full:
            z = (x - self.means.flatten(1)[:, None]) @ self.eigenvectors
            variance = self.eigenvalues[:, None] + level
            log_normal = -0.5 * (z**2 / variance + (2 * math.pi * variance).log()).sum(-1).mT
        else:
            z = (x - self._centre) @ self.eigenvectors
            variance = self.eigenvalues + level
            own = -0.5 * (z**2 / variance + (2 * math.pi * variance).log()).sum(-1, keepdim=True)
            cross = (z / variance) @ self._modes.mT
            log_normal = own + cross - 0.5 * (1 / variance) @ (self._modes**2).mT
        log_joint = log_normal + self.log_weights
        if label is not None:
            components = torch.arange(len(self.means), device=x.device)
            label = label.to(x.device)[:, None]
            log_joint = log_joint.masked_fill((label >= 0) & (label != components), -math.inf)
        return z, variance, log_joint, level
