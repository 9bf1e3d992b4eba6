"""Over-exposure: recover high dynamic range from a clipped photograph."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from invguide.arguments.rules import Positive
from invguide.forward_operator import Operator
from invguide.numerics.truncated_normal import log_mass_and_mean

from ._images import check_images, smooth_power


class HDR(Operator):
    """Gain, clipping and gamma: y = clip(gain * (x - pivot) + pivot, 0, 1)^gamma.

    No gradient passes where y is clipped, but each value is measured on its own, so that the data step is known in
    closed form (`posterior_mean`). The power is smoothed below 1e-3, where its slope may be infinite.

    Args:
        gain: Exposure or contrast, above 0, no unit; 2 is one stop. Default 2.0; that of your exposure.
        gamma: Exponent of the tone curve, above 0. Default 1.0, none; such as 1 / 2.2 where y went through one.
        pivot: Level that the gain leaves alone, data units. Default 0.0, an over-exposed photograph; 0.5 for the task
            that papers on images in [-1, 1] call high dynamic range, clip(2 x, -1, 1).

    Raises:
        InputError: gain or gamma is not a positive number; pivot is not finite.
        ShapeError: Not images (B, C, H, W).

    Example:
        >>> import torch
        >>> HDR(gain=2)(torch.tensor([0.0, 0.25, 0.5, 1.0]).reshape(1, 1, 1, 4)).flatten()
        tensor([0.0000, 0.5000, 1.0000, 1.0000])
    """

    def __init__(self, gain: Positive = 2.0, gamma: Positive = 1.0, pivot: float = 0.0) -> None:
        super().__init__()
        self.gain, self.gamma, self.pivot = gain, gamma, pivot

    def forward(self, x: Tensor) -> Tensor:
        check_images(self, x)
        exposed = self.gain * (x - self.pivot) + self.pivot
        return smooth_power(exposed.clamp(0, 1), self.gamma)

    def posterior_mean(self, x: Tensor, y: Tensor, variance: Tensor, sigma: Tensor) -> Tensor:
        """E[z | y] value by value, of z ~ N(x, variance) and y = A z + sigma n.

        Three cases, weighed by how likely each makes y: z is clipped to 0, z is clipped to 1 (Gaussians cut off at
        the level that clips) or it is between (a product of two Gaussians, cut off at both). Exact for gamma = 1; else
        the tone curve is taken as its secant from y - sigma to y + sigma.
        """
        m, y, v, s = x.double(), y.double(), variance.double(), sigma.double()
        dark = self.pivot - self.pivot / self.gain  # is clipped to 0, as all below
        bright = self.pivot + (1 - self.pivot) / self.gain  # is clipped to 1, as all above
        place, slope = self._secant(y, s)
        precision = 1 / v + (slope / s) ** 2
        between = (m / v + place * (slope / s) ** 2) / precision
        cases = []
        for centre, deviation, low, high in (
            (m, v.sqrt(), -math.inf, dark),
            (between, precision.rsqrt(), dark, bright),
            (m, v.sqrt(), bright, math.inf),
        ):
            mass, mean = log_mass_and_mean(centre, deviation, low, high)
            if math.isinf(low):
                misfit = -((y / s) ** 2) / 2
            elif math.isinf(high):
                misfit = -(((y - 1) / s) ** 2) / 2
            else:  # y's own density, up to the same constant
                misfit = -((slope * (place - m)) ** 2) / (2 * (s**2 + slope**2 * v))
                misfit = misfit - torch.log(precision * v) / 2
            cases.append((mass + misfit, mean))
        weights = torch.stack([w for w, _ in cases]).softmax(0)
        return (weights * torch.stack([mean for _, mean in cases])).sum(0).to(x.dtype)

    def _secant(self, y: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return (place, slope), with y about slope (z - place) + sigma n near y where nothing is clipped."""
        if self.gamma == 1:
            return self.pivot + (y - self.pivot) / self.gain, torch.full_like(y, self.gain)
        # Away from the ends by at least sigma, so that the secant has a length there.
        middle = torch.minimum(torch.maximum(y, sigma), 1 - sigma).clamp(1e-3, 1 - 1e-3)
        below, above = (middle - sigma).clamp_min(0), (middle + sigma).clamp_max(1)
        exposed, start = above ** (1 / self.gamma), below ** (1 / self.gamma)
        slope = (above - below) / (exposed - start)
        place = start + (y - below) / slope
        return self.pivot + (place - self.pivot) / self.gain, slope * self.gain

    def input_shape(self, y_shape: tuple[int, ...]) -> tuple[int, ...]:
        return y_shape

    def extra_repr(self) -> str:
        return f"gain={self.gain:g}, gamma={self.gamma:g}, pivot={self.pivot:g}"
