"""Blur as light undergoes it, before the camera applies its tone curve."""

from __future__ import annotations

from torch import Tensor

from invguide.arguments.rules import Positive
from invguide.forward_operator import Operator

from ._convolution import Convolution
from ._images import smooth_power
from ._separable import Padding


class NonlinearBlur(Operator):
    """Blur in linear light, y = (kernel * x^gamma)^(1 / gamma): bright points spread further than in `Blur`.

    Powers keep the sign of their argument and are smoothed below 1e-3, so that gradients are finite everywhere.

    Args:
        kernel: As in `Blur`: (H, W) in pixels, both odd, centred, summing to 1.
        gamma: Exponent of the tone curve, above 0. Default 2.2, about that of displays; 1 gives the linear blur.
        padding: As in `Blur`. Default "reflect"; "valid" where y is smaller than x.

    Raises:
        InputError: gamma is not a positive number; a kernel that `Blur` refuses.
        ShapeError: As in `Blur`.

    Example:
        >>> import torch
        >>> NonlinearBlur(torch.full((3, 3), 1 / 9))(torch.rand(1, 3, 8, 10)).shape
        torch.Size([1, 3, 8, 10])
    """

    def __init__(
        self, kernel: Tensor, gamma: Positive = 2.2, padding: Padding = "reflect"
    ) -> None:
        super().__init__()
        self.gamma = gamma
        self.blur = Convolution(kernel, padding)

    def forward(self, x: Tensor) -> Tensor:
        return smooth_power(self.blur(smooth_power(x, self.gamma)), 1 / self.gamma)

    def input_shape(self, y_shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.blur.input_shape(y_shape)

    def extra_repr(self) -> str:
        return f"gamma={self.gamma:g}"
