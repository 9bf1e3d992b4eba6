"""Rewards on the plane with no useful gradient, whose tilted density p(x) exp(r(x)) is easily known on a grid."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from invguide.errors import InputError, ShapeError
from invguide.reward import Reward


@dataclass(frozen=True)
class PlaneReward(Reward):
    """A reward of points (N, 2) that is constant between jumps.

    Args:
        height: Size of one jump of the reward: exp(height) is the ratio of the densities at its two sides.
        width: Size of one piece of the plane.
    """

    height: float = 1.0
    width: float = 1.0
    differentiable = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.height):
            raise InputError(f"height is {self.height}; expected a finite number")
        if not 0 < self.width < math.inf:
            raise InputError(f"width is {self.width}; expected a finite number above 0")

    def __call__(self, x: Tensor) -> Tensor:
        if x.ndim != 2 or x.shape[1] != 2:
            raise ShapeError(
                f"{type(self).__name__} was given {tuple(x.shape)}; expected points of the plane (N, 2)"
            )
        return self.height * self.level(x.detach() / self.width)

    @abstractmethod
    def level(self, x: Tensor) -> Tensor:
        """Return the reward of x (N, 2) in units of height, lengths in units of width, (N,)."""


class Staircase(PlaneReward):
    """height * floor(x_0 / width): a slope that shows as steps only."""

    def level(self, x: Tensor) -> Tensor:
        return x[:, 0].floor()


class Indicator(PlaneReward):
    """height within `width` of the origin, 0 elsewhere."""

    def level(self, x: Tensor) -> Tensor:
        return (x.norm(dim=1) <= 1).to(x)


class Checkerboard(PlaneReward):
    """height on the dark squares of side width, 0 on the others; the square right and above the origin is dark."""

    def level(self, x: Tensor) -> Tensor:
        return 1 - x.floor().sum(1).remainder(2)
