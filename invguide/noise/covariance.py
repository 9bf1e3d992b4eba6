"""Gaussian noise whose entries depend on each other: full, per block, and diagonal plus low rank covariances."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from invguide.errors import InputError, ShapeError
from invguide.noise.model import GaussianLaw, fitted, number


class CorrelatedGaussian(GaussianLaw):
    """y = A x + n, n normal with covariance C: of all entries of a measurement, or of blocks that are independent.

    Whitened by the inverse Cholesky factor, L^-1 (y - A x), C = L L*. For complex y, C is hermitian and that of each of
    the two parts of n, as sigma_y is for `Gaussian`: C = E[n n*] / 2, n circular.

    Args:
        covariance: Measurement units squared, positive definite; (m, m) or one for each measurement (B, m, m), with m
            the numbers of a measurement in the order of `y.flatten(1)`. With `axes`: (..., k, k), k the numbers in one
            block, and ... the other axes of a measurement or what broadcasts to them, with or without a batch axis.
        axes: Axes of one measurement (without the batch) that make up a block; all other axes count blocks, which are
            independent. Default None: all; 0 with y (B, C, H, W) where the channels of each pixel have a covariance (C,
            C).

    Raises:
        InputError: The covariance is not finite, hermitian or positive definite.
        ShapeError: It does not fit y.

    Example:
        >>> law = CorrelatedGaussian([[0.04, 0.02], [0.02, 0.04]], axes=0)  # two channels, the same at every pixel
        >>> law.bind(torch.zeros(1, 2, 8, 8)).whiten(torch.ones(1, 2, 8, 8)).shape
        torch.Size([1, 2, 8, 8])
    """

    tensors = ("covariance", "inverse")

    def __init__(
        self,
        covariance: Tensor | np.ndarray | Sequence[Sequence[float]],
        axes: int | Sequence[int] | None = None,
    ) -> None:
        self.covariance = number(covariance, True)  # pyright: ignore[reportArgumentType]
        self.axes = None if axes is None else (axes,) if isinstance(axes, int) else tuple(axes)
        self.inverse = self.covariance.new_zeros(0)  # L^-1, once bound

    def bind(self, y: Tensor) -> CorrelatedGaussian:
        rank = y.ndim - 1
        axes = tuple(range(rank)) if self.axes is None else self.axes
        if not all(-rank <= a < rank for a in axes) or len({a % rank for a in axes}) < len(axes):
            raise ShapeError(
                f"CorrelatedGaussian: axes={axes}; expected different axes of one measurement {tuple(y.shape[1:])}"
            )
        law = self._with(axes=tuple(sorted(a % rank for a in axes)))
        blocks = law._blocks(y)
        given = self.covariance.detach().to(y.device)
        wanted = (*blocks.shape, blocks.shape[-1])
        lead = given.shape[:-2]
        if len(lead) == blocks.ndim - 2:  # no batch axis
            given = given[None]
        while given.ndim < len(wanted) and len(lead) == 0:
            given = given[None]
        if given.ndim != len(wanted) or any(
            a not in (1, b) for a, b in zip(given.shape[:-2], wanted[:-2], strict=True)
        ):
            raise self._misfit(y, blocks)
        if given.shape[-2:] != wanted[-2:]:
            raise self._misfit(y, blocks)
        exact = given.to(torch.complex128 if given.is_complex() else torch.float64)
        if exact.is_complex() and not y.is_complex():
            raise InputError("CorrelatedGaussian: the covariance is complex and y is real")
        size = exact.abs().amax()
        if not bool(torch.isfinite(size)) or bool((exact - exact.mH).abs().amax() > 1e-6 * size):
            raise InputError("CorrelatedGaussian: the covariance is not finite and symmetric")
        return law._with(covariance=exact)._factorised(y)

    def _misfit(self, y: Tensor, blocks: Tensor) -> ShapeError:
        k, rest = blocks.shape[-1], tuple(blocks.shape[1:-1])
        return ShapeError(
            f"CorrelatedGaussian: the covariance has shape {tuple(self.covariance.shape)}; expected ({k}, {k})"
            f"{f', or one for each of the blocks, {(*rest, k, k)}' if rest else ''}, or the same with a batch axis of "
            f"{len(y)}: axes={self.axes} of measurements {tuple(y.shape[1:])}"
        )

    def _factorised(self, y: Tensor) -> CorrelatedGaussian:
        factor, failed = torch.linalg.cholesky_ex(self.covariance)
        if bool((failed > 0).any()):
            least = torch.linalg.eigvalsh(self.covariance).amin().item()
            raise InputError(
                f"CorrelatedGaussian: the covariance is not positive definite (least eigenvalue {least:.3g}); add the "
                "white noise that every measurement has to its diagonal"
            )
        one = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        inverse = torch.linalg.solve_triangular(factor, one.expand_as(factor), upper=False)
        kind = y.dtype if inverse.is_complex() else y.real.dtype
        return self._with(inverse=inverse.to(kind))

    def marginal(self, known: Tensor) -> CorrelatedGaussian:
        """Rows and columns of unknown entries are those of the identity: what is known keeps its own covariance."""
        blocks = self._blocks(known.to(self.covariance.device)).double()
        kept = self.covariance * blocks[..., :, None] * blocks[..., None, :]
        like = torch.empty(0, dtype=self.inverse.dtype, device=self.inverse.device)
        return self._with(covariance=kept + torch.diag_embed(1 - blocks))._factorised(like)

    def _blocks(self, values: Tensor) -> Tensor:
        """(N, *y_shape) -> (N, *others, k)."""
        assert self.axes is not None
        rank, inside = values.ndim - 1, len(self.axes)
        moved = values.movedim([a + 1 for a in self.axes], tuple(range(-inside, 0)))
        return moved.flatten(rank + 1 - inside) if inside else moved

    def _unblocks(self, blocks: Tensor, like: Tensor) -> Tensor:
        assert self.axes is not None
        sizes = [like.shape[a + 1] for a in self.axes]
        moved = blocks.unflatten(-1, sizes)
        return moved.movedim(tuple(range(-len(sizes), 0)), [a + 1 for a in self.axes])

    def whiten(self, residual: Tensor) -> Tensor:
        return self._apply(self.inverse, residual)

    def whiten_adjoint(self, u: Tensor) -> Tensor:
        return self._apply(self.inverse.mH, u)

    def _apply(self, matrix: Tensor, values: Tensor) -> Tensor:
        blocks = self._blocks(values)
        if matrix.shape[:-2].numel() == 1:  # one for all: a single product
            flat = matrix.reshape(matrix.shape[-2:])
            return self._unblocks(blocks @ flat.mT.to(blocks.dtype), values)
        image = (matrix.to(blocks.dtype) @ blocks[..., None])[..., 0]
        return self._unblocks(image, values)

    def sigma(self, predicted: Tensor, y: Tensor) -> Tensor:
        variance = self.covariance.diagonal(dim1=-2, dim2=-1).real
        blocks = self._blocks(y.real)
        deviations = variance.sqrt().to(blocks).expand(blocks.shape)
        return self._unblocks(deviations, y)

    def rows(self, index: Tensor) -> CorrelatedGaussian:
        return self._each(lambda t: t if len(t) == 1 else t[index])

    def to(self, device: torch.device | str, dtype: torch.dtype) -> CorrelatedGaussian:
        """The covariance stays in double precision."""
        kind = dtype.to_complex() if self.inverse.is_complex() else dtype
        return self._with(
            covariance=self.covariance.to(device), inverse=self.inverse.to(device, kind)
        )


class LowRankGaussian(GaussianLaw):
    """y = A x + n, n normal with covariance diag(sigma_y^2) + F F*: white noise, and r patterns of random amplitude.

    Such as offsets that many numbers share, drifts, or background templates. Nothing of m x m numbers is formed: with
    W = F / sigma_y = Q s V*, the whitened residual is (I - Q (1 - (1 + s^2)^-1/2) Q*) (y - A x) / sigma_y.

    Args:
        sigma_y: Standard deviation of the white part, measurement units, above 0; shapes as for `Gaussian`.
        factor: F, measurement units: one pattern (*y_shape), or r of them in the last axis, (*y_shape, r) or (m, r),
            m the numbers of a measurement in the order of `y.flatten(1)`. Shared by all measurements.

    Raises:
        InputError: sigma_y is not positive, the factor is not finite.
        ShapeError: Either does not fit y.
    """

    tensors = ("sigma_y", "factor", "basis", "shrink")

    def __init__(self, sigma_y: Tensor | float, factor: Tensor | np.ndarray) -> None:
        self.sigma_y, self.factor = number(sigma_y), number(factor, True)
        self.basis = self.shrink = self.factor.new_zeros(0)  # Q and 1 - (1 + s^2)^-1/2, once bound

    def bind(self, y: Tensor) -> LowRankGaussian:
        sigma = self.sigma_y.detach()
        if not bool(((sigma > 0) & sigma.isfinite()).all()):
            raise InputError(
                f"LowRankGaussian: sigma_y is {sigma.min().item():g}; expected a positive standard deviation"
            )
        alike = sigma.ndim < y.ndim or sigma.shape[0] == 1
        fit = fitted(sigma, y, "sigma_y of LowRankGaussian")
        shape, m = y.shape[1:], y[0].numel()
        factor = self.factor.detach().to(y.device)
        if factor.shape == shape:
            factor = factor[..., None]
        if factor.shape[:-1] not in (shape, (m,)):
            raise ShapeError(
                f"LowRankGaussian: the factor has shape {tuple(factor.shape)}; expected {(*shape, 'r')} or ({m}, r)"
            )
        exact = factor.to(torch.complex128 if factor.is_complex() else torch.float64)
        exact = exact.reshape(1, m, -1)
        if not bool(exact.abs().isfinite().all()) or (exact.is_complex() and not y.is_complex()):
            raise InputError(
                "LowRankGaussian: the factor is not finite, or complex where y is real"
            )
        law = self._with(sigma_y=fit, factor=exact)
        return law._decomposed(y, (fit[:1] if alike else fit).expand(-1, *shape))

    def _decomposed(self, y: Tensor, sigma: Tensor) -> LowRankGaussian:
        scaled = self.factor / sigma.flatten(1)[..., None].double()
        Q, s, _ = torch.linalg.svd(scaled, full_matrices=False)
        kind = y.dtype if Q.is_complex() else y.real.dtype
        shrink = (1 - (1 + s**2).rsqrt()).to(y.real.dtype)
        return self._with(basis=Q.to(kind), shrink=shrink)

    def marginal(self, known: Tensor) -> LowRankGaussian:
        """Patterns are 0 where nothing is known: the rest of them has the covariance of what is."""
        known = known.to(self.factor.device)
        shared = len(self.basis) == 1 and len(known) == 1
        law = self._with(factor=self.factor * known.flatten(1)[..., None])
        sigma = self.sigma_y[:1] if shared else self.sigma_y
        return law._decomposed(self.basis[:0, :0], sigma.expand(-1, *known.shape[1:]))

    def whiten(self, residual: Tensor) -> Tensor:
        return self._rotate(residual / self.sigma_y)

    def whiten_adjoint(self, u: Tensor) -> Tensor:
        return self._rotate(u) / self.sigma_y

    def _rotate(self, values: Tensor) -> Tensor:
        flat = values.flatten(1)[..., None]
        basis = self.basis.to(values.dtype)
        pattern = basis @ (self.shrink[..., None] * (basis.mH @ flat))
        return (flat - pattern).reshape(values.shape)

    def sigma(self, predicted: Tensor, y: Tensor) -> Tensor:
        patterns = (self.factor.abs() ** 2).sum(-1).reshape(-1, *y.shape[1:])
        return (self.sigma_y**2 + patterns.to(self.sigma_y)).sqrt()

    def rows(self, index: Tensor) -> LowRankGaussian:
        kept = {n: getattr(self, n) for n in ("factor", "basis", "shrink")}
        some = {n: t if len(t) == 1 else t[index] for n, t in kept.items()}
        return self._with(sigma_y=self.sigma_y[index], **some)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> LowRankGaussian:
        """The factor stays in double precision."""
        moved = super().to(device, dtype)
        return moved._with(factor=self.factor.to(device))
