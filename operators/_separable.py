"""Filters that treat rows and columns apart: y = Kh x Kw^T, with one small dense matrix per axis.

The matrices make the adjoint exact under every boundary, and the singular value decomposition of the whole operator
is that of its two axes. They depend on the image size, so they are cached outside of the operators.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from invguide.forward_operator import SVD, LinearOperator

from ._images import check_images

Padding = Literal["circular", "reflect", "valid"]


@dataclass(frozen=True)
class Filter:
    """Output i is sum_j taps[j] * x[stride * i + start + j], centred on the i-th block of `stride` pixels.

    Attributes:
        taps: Weights, as many as `stride` modulo 2, so that the centre falls on the grid.
        stride: Pixels of x per pixel of y; the last block may be incomplete.
        padding: How x goes on beyond its edges. "reflect": d c b a | a b c d | d c b a, the edge pixel repeated;
            "circular": periodic; "valid": not at all, so y is smaller (stride 1 only).
    """

    taps: tuple[float, ...]
    stride: int = 1
    padding: str = "reflect"

    @classmethod
    def normalised(cls, weights: list[float], stride: int = 1, padding: str = "reflect") -> Filter:
        total = math.fsum(weights)
        return cls(tuple(w / total for w in weights), stride, padding)

    def output_size(self, size: int) -> int:
        if self.padding == "valid":
            return size - len(self.taps) + 1
        return math.ceil(size / self.stride)

    def input_size(self, size: int) -> int:
        """Return the pixels of x for this many of y, a multiple of the stride."""
        return size + len(self.taps) - 1 if self.padding == "valid" else size * self.stride

    def matrix(self, size: int) -> Tensor:
        """Return the dense matrix (output_size, size), float64."""
        rows = torch.arange(self.output_size(size))
        matrix = torch.zeros(len(rows), size, dtype=torch.float64)
        assert self.padding == "valid" or (self.stride - len(self.taps)) % 2 == 0
        start = 0 if self.padding == "valid" else (self.stride - len(self.taps)) // 2
        for j, tap in enumerate(self.taps):
            column = rows * self.stride + start + j
            if self.padding == "circular":
                column = column % size
            elif self.padding == "reflect":
                column = column % (2 * size)
                column = torch.minimum(column, 2 * size - 1 - column)
            matrix[rows, column] += tap
        return matrix

    @property
    def diagonal(self) -> bool:
        """Whether the cosine or Fourier basis of the boundary diagonalises the filter."""
        return self.stride == 1 and self.padding != "valid" and self.taps == self.taps[::-1]


def eigenbasis(size: int, padding: str) -> Tensor:
    """Return the orthonormal columns, float64, that diagonalise every symmetric filter under this boundary.

    "reflect": the cosines of the DCT-II. "circular": the real Fourier basis cos + sin (discrete Hartley).
    """
    k = torch.arange(size, dtype=torch.float64)
    n = k[:, None]
    if padding == "reflect":
        basis = torch.cos(math.pi * (n + 0.5) * k / size) * math.sqrt(2 / size)
        basis[:, 0] /= math.sqrt(2)
        return basis
    angle = 2 * math.pi * (n * k % size) / size
    return (torch.cos(angle) + torch.sin(angle)) / math.sqrt(size)


class AxisSVD(NamedTuple):
    U: Tensor  # (output_size, r)
    s: Tensor  # (r,)
    V: Tensor  # (size, r)


# Results of a cache outlive the call: `inference_mode(False)` keeps them usable by autograd later on.
@lru_cache(maxsize=32)
@torch.inference_mode(False)
@torch.no_grad()
def axis_matrix(spec: Filter, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.device("cpu"):
        return spec.matrix(size).to(dtype).to(device)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
@torch.no_grad()
def cached_eigenbasis(size: int, padding: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.device("cpu"):
        return eigenbasis(size, padding).to(dtype).to(device)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
@torch.no_grad()
def axis_svd(spec: Filter, size: int, dtype: torch.dtype, device: torch.device) -> AxisSVD:
    with torch.device("cpu"):
        matrix = spec.matrix(size)
        if spec.diagonal:
            basis = eigenbasis(size, spec.padding)
            factors = basis, (basis * (matrix @ basis)).sum(0), basis
        else:
            u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
            factors = u, s, vh.mT.contiguous()
        return AxisSVD(*(factor.to(dtype).to(device) for factor in factors))


def sandwich(left: Tensor, x: Tensor, right: Tensor) -> Tensor:
    """Return left x right^T for every image of x (..., H, W)."""
    return left @ (x @ right.mT)


class SeparableOperator(LinearOperator):
    """The same filter along both axes of images (B, C, H, W)."""

    def __init__(self, spec: Filter) -> None:
        super().__init__()
        self.spec = spec

    def _check(self, x: Tensor) -> None:
        needed = len(self.spec.taps) if self.spec.padding == "valid" else 1
        check_images(self, x, minimum=(needed, needed))

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        rows, columns = (axis_matrix(self.spec, n, x.dtype, x.device) for n in x.shape[-2:])
        return sandwich(rows, x, columns)

    def adjoint(self, y: Tensor) -> Tensor:
        check_images(self, y)
        size = self.input_shape(tuple(y.shape[1:]))[-2:]
        rows, columns = (axis_matrix(self.spec, n, y.dtype, y.device) for n in size)
        return sandwich(rows.mT, y, columns.mT)

    def input_shape(self, y_shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*y_shape[:-2], *(self.spec.input_size(n) for n in y_shape[-2:]))

    def svd(self, x: Tensor) -> SVD:
        self._check(x)
        rows, columns = (axis_svd(self.spec, n, x.dtype, x.device) for n in x.shape[-2:])
        return SVD(
            s=torch.outer(rows.s, columns.s).expand(x.shape[1], -1, -1),
            U=lambda z: sandwich(rows.U, z, columns.U),
            U_adjoint=lambda y: sandwich(rows.U.mT, y, columns.U.mT),
            V=lambda z: sandwich(rows.V, z, columns.V),
            V_adjoint=lambda x: sandwich(rows.V.mT, x, columns.V.mT),
        )
