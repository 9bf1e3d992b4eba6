"""A value to increase, in place of a likelihood: r(x) of clean signals in data units."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from invguide.errors import ShapeError


class Reward(ABC):
    """Higher is better; the target is p(x) exp(r(x)). Must neither change x nor couple rows."""

    differentiable: bool = True

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """(B, *shape), data units -> (B,)."""


class FunctionReward(Reward):
    """Any callable (B, *shape) -> (B,) as a reward; its output is checked at every call."""

    def __init__(self, function: Callable[[Tensor], Tensor], differentiable: bool) -> None:
        self.function, self.differentiable = function, differentiable

    def __call__(self, x: Tensor) -> Tensor:
        value = torch.as_tensor(self.function(x), device=x.device)
        if value.shape != (len(x),):
            raise ShapeError(
                f"the reward returned shape {tuple(value.shape)} for {len(x)} samples; "
                f"expected ({len(x)},), one value each"
            )
        return value.to(x.dtype)
