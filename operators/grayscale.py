"""Colour to grey: colourisation as an inverse problem."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from invguide.arguments.rules import Items, Number
from invguide.errors import InputError
from invguide.forward_operator import SVD, LinearOperator

from ._images import check_images


class Grayscale(LinearOperator):
    """Weighted sum of the channels, (B, C, H, W) -> (B, 1, H, W).

    Args:
        weights: One per channel, no unit. Default (0.299, 0.587, 0.114), the luma of red, green and blue (ITU-R BT.601,
            as PIL); others for other channels or another grey.

    Example:
        >>> import torch
        >>> Grayscale()(torch.ones(1, 3, 4, 6)).shape
        torch.Size([1, 1, 4, 6])
    """

    def __init__(
        self,
        weights: Annotated[tuple[float, ...], Items((Number(),), least=2)] = (0.299, 0.587, 0.114),
    ) -> None:
        super().__init__()
        if not any(weights):
            raise InputError("Grayscale: all weights are 0, so that nothing is measured")
        self.weights = weights

    def _column(self, like: Tensor) -> Tensor:
        return like.new_tensor(self.weights).reshape(-1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        check_images(self, x, channels=len(self.weights))
        return (self._column(x) * x).sum(1, keepdim=True)

    def adjoint(self, y: Tensor) -> Tensor:
        check_images(self, y, channels=1)
        return self._column(y) * y

    def input_shape(self, y_shape: tuple[int, ...]) -> tuple[int, ...]:
        return (len(self.weights), *y_shape[1:])

    def svd(self, x: Tensor) -> SVD:
        weights = self._column(x)
        length = weights.norm()
        unit = weights / length
        return SVD(
            s=length.expand(1, *x.shape[2:]),
            U=lambda z: z,
            U_adjoint=lambda y: y,
            V=lambda z: unit * z,
            V_adjoint=lambda x: (unit * x).sum(1, keepdim=True),
        )

    def extra_repr(self) -> str:
        return f"weights={self.weights}"
