"""Denoising: the measurement is the signal itself."""

from __future__ import annotations

from torch import Tensor

from invguide.forward_operator import SVD, LinearOperator


def _same(x: Tensor) -> Tensor:
    return x


class Identity(LinearOperator):
    """A x = x, any shape; with noise, the task is denoising."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()  # a measurement never shares memory with the signal

    def adjoint(self, y: Tensor) -> Tensor:
        return y.clone()

    def input_shape(self, y_shape: tuple[int, ...]) -> tuple[int, ...]:
        return y_shape

    def svd(self, x: Tensor) -> SVD:
        return SVD(x.new_ones(x.shape[1:]), _same, _same, _same, _same)
