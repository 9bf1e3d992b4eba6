"""Blur by a camera or subject that moves along a line during the exposure."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from invguide.arguments.rules import Number

from ._convolution import Convolution
from ._images import WIDEST
from ._separable import Padding


def line_kernel(length: float, angle: float) -> Tensor:
    """Return the kernel (n, n), float64, of a line of `length` pixels at `angle` degrees through its centre.

    The line is sampled 16 times per pixel, each point shared between its four neighbours (bilinear), so that any
    angle and any fraction of a pixel make a difference.
    """
    with torch.device("cpu"):
        position = (torch.arange(round(16 * length) or 1, dtype=torch.float64) + 0.5) / 16
        position = position - position.mean()
        radius = math.ceil(length / 2)
        kernel = torch.zeros(2 * radius + 3, 2 * radius + 3, dtype=torch.float64)
        row = radius + 1 - position * math.sin(math.radians(angle))
        column = radius + 1 + position * math.cos(math.radians(angle))
        for i in (0, 1):
            for j in (0, 1):
                r, c = row.floor() + i, column.floor() + j
                weight = (1 - (row - r).abs()) * (1 - (column - c).abs())
                kernel.index_put_((r.long(), c.long()), weight, accumulate=True)
        used = kernel.amax(1) > 1e-9, kernel.amax(0) > 1e-9
        # Symmetric about the centre, so cutting the empty margin keeps the sizes odd.
        kernel = kernel[used[0]][:, used[1]]
        return kernel / kernel.sum()


class MotionBlur(Convolution):
    """Convolution with a straight line.

    Args:
        length: Of the line, pixels, above 1.
        angle: Degrees, counter-clockwise from the direction to the right. Default 0.0; that of the motion.
        padding: As in `Blur`. Default "reflect"; "valid" where y is smaller than x.

    Raises:
        InputError: length is not above 1, angle is not finite; unknown padding.
        ShapeError: An image smaller than the line.

    Example:
        >>> import torch
        >>> MotionBlur(length=9, angle=30)(torch.ones(1, 3, 16, 20)).shape
        torch.Size([1, 3, 16, 20])
    """

    def __init__(
        self,
        length: Annotated[float, Number(1, WIDEST, open_low=True, unit="pixels")],
        angle: float = 0.0,
        padding: Padding = "reflect",
    ) -> None:
        super().__init__(line_kernel(length, angle).to(torch.get_default_dtype()), padding)
        self.length, self.angle = length, angle

    def extra_repr(self) -> str:
        return f"length={self.length}, angle={self.angle}, padding={self.padding!r}"
