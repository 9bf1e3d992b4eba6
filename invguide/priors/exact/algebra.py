"""What the closed-form priors share: validation, seeded draws, and the algebra of linear measurements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from invguide.arguments.arrays import Refused, as_tensor
from invguide.arguments.checks import shown
from invguide.errors import InputError, ShapeError
from invguide.forward_operator import LinearOperator, columns
from invguide.prior import Prior

Array = Tensor | np.ndarray | Sequence | float


def as_double(value: Array, name: str) -> Tensor:
    """Return a detached float64 copy, or say which argument is not finite."""
    # Numbers of a list would pass through float32 on their way.
    tensor = _as_tensor(value, name, None if isinstance(value, Tensor) else torch.float64)
    if tensor.is_complex():
        raise InputError(f"{name} is complex; expected real numbers")
    tensor = tensor.detach().to(torch.float64, copy=True)
    if not bool(tensor.isfinite().all()):
        raise InputError(f"{name} holds NaN or infinity; every entry must be finite.")
    return tensor


def _as_tensor(value: Array, name: str, dtype: torch.dtype | None = None) -> Tensor:
    try:
        return as_tensor(value, dtype)
    except Refused as refused:
        fix = str(refused) or "expected numbers"
        raise InputError(f"{name} is {shown(value)}; {fix}") from None


class Eigen(NamedTuple):
    """C = vectors diag(values) vectors^T; leading axes are a batch of matrices."""

    values: Tensor
    vectors: Tensor


def eigen(covariance: Tensor, name: str = "covariance") -> Eigen:
    """Diagonalise (..., d, d), after checking that it is symmetric and positive definite."""
    size = covariance.abs().amax(dim=(-2, -1), keepdim=True)
    skew = (covariance - covariance.mT).abs() / size.clamp_min(torch.finfo(torch.float64).tiny)
    if bool((skew > 1e-6).any()):
        raise InputError(
            f"{name} is not symmetric: |C - C^T| reaches {float(skew.max()):.1e} of the largest entry. "
            "Pass (C + C.T) / 2 if that is only rounding."
        )
    values, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
    if bool((values[..., 0] <= 0).any()):
        raise InputError(
            f"{name} is not positive definite: its smallest eigenvalue is {float(values.min()):.3g}. "
            "Add a small multiple of the identity, or drop the degenerate directions."
        )
    return Eigen(values, vectors)


def check_samples(prior: Prior, x: Tensor, condition: dict[str, Tensor]) -> None:
    """Raise unless x is (B, *prior.shape) and nothing is asked that the prior does not know."""
    if x.shape[1:] != torch.Size([size or 0 for size in prior.shape]):
        raise ShapeError(
            f"{type(prior).__name__} takes x of shape (B, {', '.join(map(str, prior.shape))}), "
            f"got {tuple(x.shape)}."
        )
    if condition:
        raise InputError(f"{type(prior).__name__} has no condition {sorted(condition)[0]!r}.")


def generator(seed: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def normal(shape: tuple[int, ...], source: torch.Generator, like: Tensor) -> Tensor:
    """Standard normals of the type and device of `like`, both parts of complex numbers."""
    parts = (*shape, 2) if like.is_complex() else shape
    draw = torch.randn(parts, generator=source, dtype=torch.float64, device=source.device)
    return (torch.view_as_complex(draw) if like.is_complex() else draw).to(like)


class Measurement(NamedTuple):
    """y = matrix x + noise in normalised units, real and flattened: matrix (m, d), y (m,)."""

    matrix: Tensor
    y: Tensor
    variance: float


def real(y: Tensor) -> Tensor:
    """Flatten all but the first axis; complex numbers become pairs of reals."""
    return (torch.view_as_real(y) if y.is_complex() else y).flatten(1)


def one_measurement(y: Array, shape: torch.Size, like: Tensor, paired: bool = False) -> Tensor:
    """Return y as a batch of one, (1, *shape), complex if `paired`; y may come with or without the batch axis."""
    y = _as_tensor(y, "y").to(like.device)
    if y.numel() != shape.numel():
        raise ShapeError(
            f"posterior takes one measurement: the operator gives {tuple(shape)}, "
            f"y has shape {tuple(y.shape)}."
        )
    if y.is_complex() and not paired:
        raise InputError("y is complex, and the operator returns real values; expected a real y")
    return y.reshape(1, *shape).to(torch.promote_types(y.dtype, like.dtype))


def check_noise(sigma_y: float) -> float:
    if not 0 < float(sigma_y) < float("inf"):
        raise InputError(f"sigma_y must be positive and finite, got {sigma_y}.")
    return float(sigma_y)


def densify(prior: Prior, A: Tensor | LinearOperator, y: Array, sigma_y: float) -> Measurement:
    """Write y = A(scale x + shift) + sigma_y n as dense algebra on the flattened x.

    Complex measurements are pairs of reals, each with standard deviation sigma_y.
    """
    like = next(iter(prior.buffers()))
    shape = tuple(size or 0 for size in prior.shape)
    d = torch.Size(shape).numel()
    if isinstance(A, LinearOperator):
        images = columns(A, shape, like)
        out_shape, matrix, paired = images.shape[1:], real(images).mT, images.is_complex()
    else:
        matrix = _as_tensor(A, "A").to(like)
        if matrix.ndim != 2 or matrix.shape[1] != d:
            raise ShapeError(
                f"A must be a LinearOperator or a matrix (m, {d}), got {tuple(matrix.shape)}."
            )
        out_shape, paired = matrix.shape[:1], False
    target = real(one_measurement(y, out_shape, like, paired))[0] - prior.shift * matrix.sum(1)
    return Measurement(prior.scale * matrix, target, check_noise(sigma_y) ** 2)


def kalman(covariance: Tensor, measurement: Measurement) -> tuple[Tensor, Tensor, Tensor]:
    """Return gain (..., d, m), posterior covariance (..., d, d), Cholesky of A C A^T + sigma_y^2 I.

    The covariance is in Joseph's form, which stays symmetric and positive where C - K A C cancels.
    """
    A, _, variance = measurement
    cross = covariance @ A.mT
    innovation = A @ cross + variance * torch.eye(len(A), dtype=A.dtype, device=A.device)
    factor = torch.linalg.cholesky(innovation)
    gain = torch.cholesky_solve(cross.mT, factor).mT
    rest = torch.eye(A.shape[1], dtype=A.dtype, device=A.device) - gain @ A
    return gain, rest @ covariance @ rest.mT + variance * gain @ gain.mT, factor


def noise_range(second_moment: float, smallest_variance: float) -> tuple[float, float]:
    """Return (sigma_min, sigma_max) for data with this largest second moment along any direction.

    At sigma_max = 20 root mean squares a clean signal moves the noisy one by 5 % of a standard
    deviation, so pure noise is a fair start; at sigma_min nothing but 1e-3 of the narrowest
    direction is left. The second moment and not the variance, for the mean has to be drowned too.
    """
    return 1e-3 * smallest_variance**0.5, 20 * second_moment**0.5
