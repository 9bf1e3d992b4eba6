"""Inner products, norms and conjugate gradients, each sample of a batch on its own."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor


def per_sample(value: Tensor | float, x: Tensor) -> Tensor:
    """Shape a scalar or (B,) value so that it broadcasts over the samples of x (B, *shape)."""
    value = torch.as_tensor(value, dtype=x.dtype, device=x.device)
    return value if value.ndim == 0 else value.reshape(-1, *(1,) * (x.ndim - 1))


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Real inner product of each sample, (B, ...) x (B, ...) -> (B,); complex numbers count as pairs of reals."""
    product = (a.conj() * b).real if a.is_complex() or b.is_complex() else a * b
    return product.flatten(1).sum(1)


def norm(a: Tensor) -> Tensor:
    """Euclidean norm of each sample, (B, ...) -> (B,)."""
    return inner(a, a).sqrt()


@dataclass
class InnerSolves:
    """What `conjugate_gradient` did while it was counted, of batches as a whole."""

    solves: int = 0
    iterations: int = 0
    most: int = 0  # of one solve
    unfinished: int = 0  # solves that ended at their most iterations, above the accuracy asked for

    def iterate(self) -> None:
        """Count an iteration; what raises here ends the solve."""
        self.iterations += 1

    def end(self, iterations: int, finished: bool) -> None:
        self.solves += 1
        self.most = max(self.most, iterations)
        self.unfinished += not finished


_COUNT: ContextVar[InnerSolves | None] = ContextVar("inner solves", default=None)


@contextmanager
def counted_solves(count: InnerSolves) -> Generator[None]:
    """Count the conjugate gradients of this thread into `count`."""
    token = _COUNT.set(count)
    try:
        yield
    finally:
        _COUNT.reset(token)


def conjugate_gradient(
    matvec: Callable[[Tensor], Tensor],
    rhs: Tensor,
    *,
    max_iterations: int = 500,
    tolerance: float = 1e-6,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    enough: Tensor | None = None,
) -> Tensor:
    """Solve matvec(x) = rhs for a symmetric positive definite map, each sample on its own.

    A sample that has converged is frozen, so that its answer does not depend on how long its neighbours in the batch
    take. Each right-hand side is scaled to length 1, so that units of any size leave squares within range.

    Args:
        matvec: The map, (B, ...) -> (B, ...).
        rhs: Right-hand sides, (B, ...).
        max_iterations: Stop here even where the tolerance is not reached.
        tolerance: A sample has converged where |residual| is at most this times |rhs|,
        enough: or at most this, (B,), where given.
        preconditioner: About the inverse of the map, symmetric positive definite too, (B, ...) -> (B, ...).
    """
    length_of_rhs = norm(rhs)
    unit = torch.where(length_of_rhs > 0, length_of_rhs, 1.0)
    rhs = rhs / per_sample(unit, rhs.real)
    x, residual = torch.zeros_like(rhs), rhs
    conditioned = rhs if preconditioner is None else preconditioner(rhs)
    direction = conditioned
    square = inner(residual, conditioned)
    goal = torch.full_like(unit, tolerance)
    goal = goal if enough is None else torch.maximum(goal, enough / unit)
    iterations, count = 0, _COUNT.get()
    while bool((active := (norm(residual) > goal) & (square > 0)).any()):
        if iterations == max_iterations:
            break
        iterations += 1
        if count is not None:
            count.iterate()
        image = matvec(direction)
        curvature = inner(direction, image)
        length = torch.where(active & (curvature > 0), square / curvature, 0.0)
        x = x + per_sample(length, x.real) * direction
        residual = residual - per_sample(length, x.real) * image
        conditioned = residual if preconditioner is None else preconditioner(residual)
        new_square = inner(residual, conditioned)
        ratio = torch.where(active, new_square / square, 0.0)
        direction = conditioned + per_sample(ratio, x.real) * direction
        square = torch.where(active, new_square, square)
    if count is not None:
        count.end(iterations, finished=not bool(active.any()))
    return x * per_sample(unit, x.real)
