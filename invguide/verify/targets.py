"""Inverse problems whose posterior is known exactly, small enough to sample by the thousand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from invguide.errors import ShapeError
from invguide.forward_operator import SVD, LinearOperator
from invguide.likelihood import Likelihood
from invguide.prior import Prior
from invguide.priors import Gaussian, GaussianMixture
from invguide.problem.problem import Problem


class MatrixOperator(LinearOperator):
    """y = matrix @ x on the flattened signal; (B, *in_shape) -> (B, m).

    Args:
        matrix: (m, d).
        in_shape: Shape of one signal, d entries; (d,) when left out.

    Raises:
        ShapeError: If matrix is not a matrix, or in_shape does not hold d entries.

    Example:
        >>> MatrixOperator(torch.tensor([[1.0, 1.0]]))(torch.tensor([[2.0, 3.0]]))
        tensor([[5.]])
    """

    matrix: Tensor

    def __init__(self, matrix: Tensor, in_shape: tuple[int, ...] | None = None) -> None:
        super().__init__()
        if matrix.ndim != 2:
            raise ShapeError(f"matrix must be (m, d), got {tuple(matrix.shape)}.")
        self.in_shape = tuple(in_shape or matrix.shape[1:])
        if torch.Size(self.in_shape).numel() != matrix.shape[1]:
            raise ShapeError(f"in_shape {self.in_shape} does not hold {matrix.shape[1]} entries.")
        self.register_buffer("matrix", matrix.detach().clone())
        U, s, V_adjoint = torch.linalg.svd(self.matrix, full_matrices=False)
        for name, factor in (("_U", U), ("_s", s), ("_V_adjoint", V_adjoint)):
            self.register_buffer(name, factor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.matrix.to(x.dtype).mT

    def adjoint(self, y: Tensor) -> Tensor:
        return (y @ self.matrix.to(y.dtype)).reshape(-1, *self.in_shape)

    def input_shape(self, y_shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.in_shape

    def svd(self, x: Tensor) -> SVD:
        U, s, Vh = (getattr(self, name).to(x) for name in ("_U", "_s", "_V_adjoint"))
        return SVD(
            s=s,
            U=lambda z: z @ U.mT,
            U_adjoint=lambda y: y @ U,
            V=lambda z: (z @ Vh).reshape(-1, *self.in_shape),
            V_adjoint=lambda v: v.flatten(1) @ Vh.mT,
        )


class ExactLaw(Protocol):
    """What a posterior has to offer to be compared with; normalised units."""

    @property
    def mean(self) -> Tensor: ...
    @property
    def std(self) -> Tensor: ...
    def sample(self, n: int, seed: int = 0) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Target:
    """One measurement with its exact posterior.

    Attributes:
        name: As printed in tables.
        prior: A closed-form prior.
        operator: Linear, data units.
        y: One measurement, (1, m).
        sigma_y: Noise standard deviation, measurement units.
        posterior: p(x | y), normalised units.
    """

    name: str
    prior: Prior
    operator: LinearOperator
    y: Tensor
    sigma_y: float
    posterior: ExactLaw

    def problem(self, copies: int = 1) -> Problem:
        """Return the problem for the driver, with the measurement repeated `copies` times."""
        y = self.y.expand(copies, *self.y.shape[1:])
        # As a tensor of y's type: a plain number would be rounded to the default float32.
        sigma_y = torch.full_like(y[:, :1], self.sigma_y)
        return Problem(self.prior, Likelihood(self.operator, y, sigma_y))


def _target(
    name: str, prior: Gaussian | GaussianMixture, matrix: Tensor, y: Tensor, sigma_y: float
) -> Target:
    posterior = prior.posterior(matrix, y, sigma_y)
    operator = MatrixOperator(matrix.double(), tuple(posterior.mean.shape))
    return Target(name, prior, operator, y[None], sigma_y, posterior)


def gaussian_2d() -> Target:
    """Two correlated Gaussian coordinates, the first one measured.

    Posterior mean (1.41743, 0.25046), std (0.28735, 0.41198), correlation 0.4185.
    """
    prior = Gaussian([0.5, -0.3], [[1.0, 0.6], [0.6, 0.5]])
    y = torch.tensor([1.5], dtype=torch.float64)
    return _target("gaussian-2d", prior, torch.tensor([[1.0, 0.0]]), y, 0.3)


def mixture_1d() -> Target:
    """Two narrow modes at -2 and 2, both explained by a vague measurement.

    Posterior probability of the upper mode 0.86234; modes at -1.79358 and 1.87615, std 0.28735.
    """
    prior = GaussianMixture([[-2.0], [2.0]], [[0.09]], [0.5, 0.5])
    y = torch.tensor([0.5], dtype=torch.float64)
    return _target("mixture-1d", prior, torch.ones(1, 1), y, 1.0)


def gaussian_64d(seed: int = 0) -> Target:
    """A Gaussian with variances 1/k in a random basis, 32 random projections, sigma_y = 0.05."""
    source = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, dtype=torch.float64)

    d, m, sigma_y = 64, 32, 0.05
    rotation = torch.linalg.qr(randn(d, d)).Q
    variances = 1 / torch.arange(1, d + 1, dtype=torch.float64)
    prior = Gaussian(torch.zeros(d), (rotation * variances) @ rotation.mT)
    matrix = randn(m, d) / d**0.5
    x = rotation @ (variances.sqrt() * randn(d))
    return _target("gaussian-64d", prior, matrix, matrix @ x + sigma_y * randn(m), sigma_y)


def mixture_25(d: int = 8, dy: int = 1, seed: int = 0) -> Target:
    """The 25-mode benchmark of Cardoso et al. 2024 (MCGdiff, arXiv 2308.07983, section 5).

    Means (8i, 8j) for i, j = -2 ... 2, repeated d / 2 times; unit covariance; weights N(0, 1)^2,
    normalised; A = U diag(s) V^T with s uniform on [0, 1]; sigma_y uniform on [0, max s].

    Args:
        d: Signal dimension, even; the paper has 8, 80 and 800.
        dy: Measurement dimension; the paper has 1, 2 and 4.
        seed: Of the operator, the noise level and the measurement. As in the paper's script the
            weights are common to all instances of one d.

    Raises:
        ShapeError: If d is odd or dy is not between 1 and d.
    """
    if d % 2 or not 1 <= dy <= d:
        raise ShapeError(f"d must be even and 1 <= dy <= d, got d={d}, dy={dy}.")
    weights = torch.randn(25, generator=torch.Generator().manual_seed(d), dtype=torch.float64) ** 2
    grid = 8 * torch.cartesian_prod(*[torch.arange(-2.0, 3.0, dtype=torch.float64)] * 2)
    prior = GaussianMixture(grid.repeat(1, d // 2), torch.eye(d), weights / weights.sum())
    source = torch.Generator().manual_seed(1_000 * seed + dy)
    U, _, Vh = torch.linalg.svd(
        torch.randn(dy, d, generator=source, dtype=torch.float64), full_matrices=False
    )
    s = torch.rand(dy, generator=source, dtype=torch.float64).sort(descending=True).values
    sigma_y = float(torch.rand((), generator=source, dtype=torch.float64) * s[0])
    matrix = U @ torch.diag(s) @ Vh
    noise = torch.randn(dy, generator=source, dtype=torch.float64)
    x = prior.sample(1, seed=int(torch.randint(2**31, (), generator=source)))[0]
    return _target(
        f"mixture-25 d={d} dy={dy}", prior, matrix, matrix @ x + sigma_y * noise, sigma_y
    )


def standard_targets() -> tuple[Target, ...]:
    """The table's default: one of each kind, seconds per solver."""
    return gaussian_2d(), mixture_1d(), gaussian_64d(), mixture_25(d=8, dy=2)
