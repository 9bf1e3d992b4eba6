"""Gaussian noise in independent blocks of different sizes, each with a covariance of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from invguide.errors import InputError, ShapeError
from invguide.noise.covariance import CorrelatedGaussian
from invguide.noise.model import GaussianLaw


class BlockGaussian(GaussianLaw):
    """y = A x + n, n normal; numbers of the same block have a covariance, those of different blocks are independent.

    Such as detectors, spectra or sessions of different lengths, joined to one measurement. Blocks of one size are
    faster as `CorrelatedGaussian` with `axes`. Complex values count as there.

    Args:
        covariances: One for each block, in the order of `y.flatten(1)`: measurement units squared, positive definite,
            (k, k), or (B, k, k) for one of each measurement, k the numbers in the block.

    Raises:
        InputError: No block, or a covariance that is not finite, hermitian or positive definite.
        ShapeError: The blocks do not add up to a measurement.

    Example:
        >>> law = BlockGaussian([[[0.04]], [[0.04, 0.02], [0.02, 0.04]]])  # one number alone, two together
        >>> law.bind(torch.zeros(1, 3)).whiten(torch.ones(1, 3))[0, 0].item()
        5.0
    """

    def __init__(
        self, covariances: Sequence[Tensor | np.ndarray | Sequence[Sequence[float]]]
    ) -> None:
        self.parts = tuple(CorrelatedGaussian(covariance) for covariance in covariances)
        shapes = [tuple(part.covariance.shape) for part in self.parts]
        odd = [shape for shape in shapes if len(shape) not in (2, 3) or shape[-1] != shape[-2]]
        if odd or not shapes:
            got = f"one of shape {odd[0]}" if odd else "none"
            raise InputError(
                f"BlockGaussian: expected covariances of shape (k, k) or (B, k, k), one for each block; got {got}"
            )
        self.sizes = [shape[-1] for shape in shapes]

    def bind(self, y: Tensor) -> BlockGaussian:
        if sum(self.sizes) != y[0].numel():
            sizes = ", ".join(map(str, self.sizes[:8])) + (", ..." if len(self.sizes) > 8 else "")
            raise ShapeError(
                f"BlockGaussian: blocks of {sizes} numbers are {sum(self.sizes)} together; one measurement "
                f"{tuple(y.shape[1:])} has {y[0].numel()}"
            )
        return self._with(parts=self._zipped(CorrelatedGaussian.bind, y))

    def marginal(self, known: Tensor) -> BlockGaussian:
        return self._with(parts=self._zipped(CorrelatedGaussian.marginal, known))

    def whiten(self, residual: Tensor) -> Tensor:
        return self._joined(CorrelatedGaussian.whiten, residual)

    def whiten_adjoint(self, u: Tensor) -> Tensor:
        return self._joined(CorrelatedGaussian.whiten_adjoint, u)

    def sigma(self, predicted: Tensor, y: Tensor) -> Tensor:
        return self._joined(lambda part, values: part.sigma(values, values), y)

    def rows(self, index: Tensor) -> BlockGaussian:
        return self._with(parts=tuple(part.rows(index) for part in self.parts))

    def to(self, device: torch.device | str, dtype: torch.dtype) -> BlockGaussian:
        return self._with(parts=tuple(part.to(device, dtype) for part in self.parts))

    def usable(self) -> BlockGaussian:
        return self._with(parts=tuple(part.usable() for part in self.parts))

    def _zipped(
        self, method: Callable[[CorrelatedGaussian, Tensor], CorrelatedGaussian], values: Tensor
    ) -> tuple[CorrelatedGaussian, ...]:
        pieces = values.flatten(1).split(self.sizes, 1)
        return tuple(method(part, piece) for part, piece in zip(self.parts, pieces, strict=True))

    def _joined(
        self, method: Callable[[CorrelatedGaussian, Tensor], Tensor], values: Tensor
    ) -> Tensor:
        pieces = values.flatten(1).split(self.sizes, 1)
        images = [method(part, piece) for part, piece in zip(self.parts, pieces, strict=True)]
        return torch.cat(images, 1).reshape(values.shape)
