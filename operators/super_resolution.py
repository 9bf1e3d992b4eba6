"""Down-sampling as a camera or a resizing program does it: low-pass filter, then every factor-th pixel."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

from torch import Tensor

from invguide.arguments.rules import Number, Size
from invguide.errors import ShapeError

from ._separable import Filter, SeparableOperator


def _cubic(t: float) -> float:
    """Keys' cubic convolution kernel with a = -1/2, the 'bicubic' of MATLAB and PIL."""
    t = abs(t)
    if t < 1:
        return (1.5 * t - 2.5) * t * t + 1
    return ((-0.5 * t + 2.5) * t - 4) * t + 2 if t < 2 else 0.0


# Kernel over t, in pixels of y, and its half width.
KERNELS: dict[str, tuple[Callable[[float], float], float]] = {
    "bicubic": (_cubic, 2),
    "box": (lambda t: float(abs(t) < 0.5), 0.5),
    "gaussian": (lambda t: math.exp(-2 * t * t), 2),
}


class SuperResolution(SeparableOperator):
    """Antialiased down-sampling by an integer factor, (B, C, H, W) -> (B, C, ceil(H / factor), ceil(W / factor)).

    Pixel i of y is centred on the i-th block of `factor` pixels of x, and the kernel is stretched by the factor, as
    MATLAB's `imresize` and PIL do; beyond its edges x is reflected, the edge pixel repeated.

    y does not tell the size of an x that is no multiple of the factor. `input_shape`, `adjoint`, `solve` and
    `pinv` take `size`, else the size of the last image that gave a y of this size, else factor times y.

    Args:
        factor: Pixels of x for one of y along each axis, a whole number of at least 2.
        filter: Before the sampling: "bicubic", "box" (mean of the block), or "gaussian" (standard deviation factor / 2
            pixels). Default "bicubic", that of image programs; "box" for sensors whose pixels are summed.
        size: (height, width) of x, pixels. Default None: as above; where x is no multiple of the factor, so that y does
            not tell.

    Raises:
        InputError: factor, filter or size is not one of these.
        ShapeError: Not images (B, C, H, W), or of another size than `size`.

    Example:
        >>> import torch
        >>> SuperResolution(factor=4)(torch.ones(1, 3, 32, 48)).shape
        torch.Size([1, 3, 8, 12])
    """

    def __init__(
        self,
        factor: Annotated[int, Number(2, 1000, whole=True)],
        filter: Literal["bicubic", "box", "gaussian"] = "bicubic",
        size: Size | None = None,
    ) -> None:
        kernel, half_width = KERNELS[filter]
        count = math.ceil(2 * half_width * factor)
        count -= (
            count - factor
        ) % 2  # centred on a pixel for odd factors, between two for even ones
        weights = [kernel((j - (count - 1) / 2) / factor) for j in range(count)]
        super().__init__(Filter.normalised(weights, stride=factor))
        self.factor, self.filter, self.size = factor, filter, size
        self._sizes: dict[tuple[int, int], tuple[int, int]] = {}

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        height, width = x.shape[-2:]
        if self.size is not None and (height, width) != tuple(self.size):
            raise ShapeError(
                f"SuperResolution was built for size={tuple(self.size)} and given {height} x {width} pixels"
            )
        self._sizes[y.shape[-2], y.shape[-1]] = (height, width)
        return y

    def input_shape(self, y_shape: tuple[int, ...]) -> tuple[int, ...]:
        *channels, height, width = y_shape
        default = (self.factor * height, self.factor * width)
        return (*channels, *(self.size or self._sizes.get((height, width), default)))

    def extra_repr(self) -> str:
        return f"factor={self.factor}, filter={self.filter!r}"
