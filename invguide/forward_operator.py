"""The Operator contracts: the map from a clean signal to its noiseless measurement, in data units."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from invguide.errors import ShapeError
from invguide.prior import per_sample


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Real inner product of each sample, (B, ...) x (B, ...) -> (B,); complex numbers count as pairs of reals."""
    product = (a.conj() * b).real if a.is_complex() or b.is_complex() else a * b
    return product.flatten(1).sum(1)


def norm(a: Tensor) -> Tensor:
    """Euclidean norm of each sample, (B, ...) -> (B,)."""
    return inner(a, a).sqrt()


def conjugate_gradient(
    matvec: Callable[[Tensor], Tensor], rhs: Tensor, *, max_iterations: int = 100, tolerance: float = 1e-6
) -> Tensor:
    """Solve matvec(x) = rhs for a symmetric positive definite map, each sample on its own.

    A sample that has converged (residual below tolerance * |rhs|) is frozen, so that its answer does not depend
    on how long its neighbours in the batch take.
    """
    x = torch.zeros_like(rhs)
    residual, direction = rhs.clone(), rhs.clone()
    square = inner(residual, residual)
    goal = tolerance**2 * square
    for _ in range(max_iterations):
        active = square > goal
        if not bool(active.any()):
            break
        image = matvec(direction)
        curvature = inner(direction, image)
        length = torch.where(active & (curvature > 0), square / curvature.clamp_min(1e-300), 0.0).to(curvature.dtype)
        x = x + per_sample(length, x).to(x.dtype) * direction
        residual = residual - per_sample(length, residual).to(residual.dtype) * image
        new_square = torch.where(active, inner(residual, residual), square)
        ratio = torch.where(active, new_square / square.clamp_min(1e-300), 0.0).to(curvature.dtype)
        direction = residual + per_sample(ratio, residual).to(residual.dtype) * direction
        square = new_square
    return x


class SVD(NamedTuple):
    """A = U diag(s) V*, as functions on batches; s is shaped like one spectral vector, zeros allowed."""

    s: Tensor
    U: Callable[[Tensor], Tensor]
    U_adjoint: Callable[[Tensor], Tensor]
    V: Callable[[Tensor], Tensor]
    V_adjoint: Callable[[Tensor], Tensor]


class Operator(nn.Module, ABC):
    """A deterministic map from data to measurement: (B, *in_shape) -> (B, *out_shape); noise is not here.

    A module, so that `.to(device)` reaches masks and kernels (register them as buffers).
    """

    differentiable: bool = True

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Measure clean signals x (B, *in_shape), data units; rows must be independent; complex outputs allowed."""

    def input_shape(self, y_shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return the shape of one x for one y of this shape (no batch axis), or None where it cannot be known."""
        return None


class LinearOperator(Operator):
    """A linear map with its exact adjoint; the rest has general defaults that a subclass may replace."""

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """Return A* y, (B, *out_shape) -> (B, *in_shape), with <A x, y> = <x, A* y> in the real inner product."""

    @property
    def svd(self) -> SVD | None:
        """The singular value decomposition where it is cheap, else None."""
        return None

    def solve(self, rhs: Tensor, ridge: Tensor | float) -> Tensor:
        """Return (A A* + ridge I)^-1 rhs; ridge > 0, scalar or (B,). Spectral where `svd` is known, else CG."""
        svd = self.svd
        ridge = per_sample(torch.as_tensor(ridge, device=rhs.device), rhs.real if rhs.is_complex() else rhs)
        if svd is None:
            return conjugate_gradient(lambda v: self.forward(self.adjoint(v)) + ridge * v, rhs)
        spectral = svd.U_adjoint(rhs)
        if ridge.ndim:
            ridge = ridge.reshape(-1, *(1,) * (spectral.ndim - 1))
        # U U* need not be the identity: what of rhs lies outside its range is only divided by the ridge.
        outside = rhs - svd.U(spectral)
        return svd.U(spectral / (svd.s.abs() ** 2 + ridge)) + outside / per_sample(ridge.flatten(), outside)

    def pinv(self, y: Tensor) -> Tensor:
        """Return the minimum-norm least-squares solution A^+ y. Exact with `svd`, else regularised CG (1e-6)."""
        svd = self.svd
        if svd is None:
            return self.adjoint(self.solve(y, 1e-6))
        cut = 1e-6 * svd.s.abs().max()
        inverse = torch.where(svd.s.abs() > cut, 1 / svd.s.where(svd.s.abs() > cut, torch.ones_like(svd.s)), 0)
        return svd.V(inverse * svd.U_adjoint(y))


def check_batch(operator: Operator, x: Tensor, y: Tensor) -> None:
    """Raise ShapeError unless the operator kept the batch axis."""
    if not isinstance(y, Tensor) or y.ndim == 0 or y.shape[0] != x.shape[0]:
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ShapeError(
            f"{type(operator).__name__} was given {x.shape[0]} samples of shape {tuple(x.shape[1:])} and returned "
            f"{got}; expected a tensor whose first axis is the batch ({x.shape[0]}). Keep the batch axis in forward."
        )
