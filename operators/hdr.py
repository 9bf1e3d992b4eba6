"""Over-exposure: recover high dynamic range from a clipped photograph."""

from __future__ import annotations

import math

from torch import Tensor

from invguide.errors import InputError
from invguide.forward_operator import Operator

from ._images import check_images, check_positive, smooth_power


class HDR(Operator):
    """Gain, clipping and gamma: y = clip(gain * (x - pivot) + pivot, 0, 1)^gamma.

    No gradient passes where y is clipped. The power is smoothed below 1e-3, where its slope may be infinite.

    Args:
        gain: Exposure or contrast; 2 is one stop.
        gamma: Exponent of the tone curve, such as 1 / 2.2; 1 for none.
        pivot: Level that the gain leaves alone. 0 is an over-exposed photograph; 0.5 the task that papers on images
            in [-1, 1] call high dynamic range, clip(2 x, -1, 1).

    Raises:
        InputError: gain or gamma is not a positive number; pivot is not finite.
        ShapeError: Not images (B, C, H, W).

    Example:
        >>> import torch
        >>> HDR(gain=2)(torch.tensor([0.0, 0.25, 0.5, 1.0]).reshape(1, 1, 1, 4)).flatten()
        tensor([0.0000, 0.5000, 1.0000, 1.0000])
    """

    def __init__(self, gain: float = 2.0, gamma: float = 1.0, pivot: float = 0.0) -> None:
        super().__init__()
        self.gain = check_positive(self, "gain", gain)
        self.gamma = check_positive(self, "gamma", gamma)
        if not math.isfinite(pivot):
            raise InputError(f"HDR: pivot={pivot!r}; expected a finite level, such as 0 or 0.5")
        self.pivot = float(pivot)

    def forward(self, x: Tensor) -> Tensor:
        check_images(self, x)
        exposed = self.gain * (x - self.pivot) + self.pivot
        return smooth_power(exposed.clamp(0, 1), self.gamma)

    def input_shape(self, y_shape: tuple[int, ...]) -> tuple[int, ...]:
        return y_shape

    def extra_repr(self) -> str:
        return f"gain={self.gain:g}, gamma={self.gamma:g}, pivot={self.pivot:g}"
