"""What a caller may have switched on around a run, and what a run needs."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

P = ParamSpec("P")
R = TypeVar("R")


def outside_inference(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function compute outside of `torch.inference_mode`, where no gradient can be taken, whoever calls it."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False):
            return function(*args, **kwargs)

    return wrapped


def usable(value: Tensor) -> Tensor:
    """Return a tensor that gradients may go through: a copy of one that was made in `torch.inference_mode`."""
    return value.clone() if value.is_inference() else value


def thaw(module: nn.Module) -> None:
    """Replace parameters and buffers that were made in `torch.inference_mode` by copies, in place.

    Outside of it, autograd refuses to keep them for the way back.
    """
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_inference():
                part._parameters[name] = nn.Parameter(parameter.clone(), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_inference():
                part._buffers[name] = buffer.clone()
