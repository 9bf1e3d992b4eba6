"""Checks that several image operators share."""

from __future__ import annotations

import math
import warnings
from typing import Annotated

import torch
from torch import Tensor

from invguide.arguments.rules import Number
from invguide.errors import InputError, ShapeError


def check_images(
    owner: object, x: Tensor, *, channels: int | None = None, minimum: tuple[int, int] = (1, 1)
) -> None:
    """Raise unless x is a real floating batch (B, C, H, W) with these channels and at least `minimum` pixels."""
    name, shape = type(owner).__name__, tuple(x.shape)
    if x.ndim != 4:
        fix = "add the batch axis with x[None]" if x.ndim == 3 else "batch and channels come first"
        raise ShapeError(
            f"{name} was given a tensor of shape {shape}; expected images (B, C, H, W): {fix}"
        )
    if not x.is_floating_point():
        raise InputError(
            f"{name} was given {x.dtype} values; expected real floating-point images: x.float() / 255"
        )
    if channels is not None and shape[1] != channels:
        raise ShapeError(
            f"{name} was given images of shape {shape}; expected {channels} channels: (B, {channels}, H, W)"
        )
    if shape[2] < minimum[0] or shape[3] < minimum[1]:
        raise ShapeError(
            f"{name} was given images of {shape[2]} x {shape[3]} pixels; it needs at least "
            f"{minimum[0]} x {minimum[1]}: use a smaller kernel or a larger image"
        )


# A blur wider than this is a slip, and its kernel would fill the memory.
WIDEST = 1000
Width = Annotated[float, Number(0, WIDEST, open_low=True, unit="pixels")]


def check_kernel(owner: object, kernel: Tensor) -> Tensor:
    """Return the kernel (H, W) of odd size, divided by its sum with a warning where that is not 1."""
    name, kernel = type(owner).__name__, kernel.detach()
    shape = tuple(kernel.shape)
    if kernel.ndim != 2 or 0 in shape:
        raise ShapeError(
            f"{name}: kernel has shape {shape}; expected two axes (H, W): one kernel for all channels"
        )
    if shape[0] % 2 == 0 or shape[1] % 2 == 0:
        raise ShapeError(
            f"{name}: kernel has the even size {shape[0]} x {shape[1]}, so no centre pixel; expected odd sizes: "
            f"pad it by a row or column of zeros"
        )
    if kernel.is_complex():
        raise InputError(f"{name}: kernel is {kernel.dtype}; expected real numbers")
    kernel = kernel if kernel.is_floating_point() else kernel.to(torch.get_default_dtype())
    total = kernel.sum().item()
    if not math.isfinite(total) or abs(total) <= 1e-6 * kernel.abs().sum().item():
        raise InputError(
            f"{name}: kernel sums to {total:g}; expected a blur kernel that sums to 1"
        )
    if abs(total - 1) > 1e-4:
        warnings.warn(
            f"{name}: kernel summed to {total:g} and was divided by it, so that it sums to 1",
            stacklevel=4,
        )
        kernel = kernel / total
    return kernel.clone()


def smooth_power(x: Tensor, exponent: float) -> Tensor:
    """Return sign(x) |x|^exponent, smoothed below 1e-3 so that the gradient is finite at zero."""
    return x if exponent == 1 else x * torch.sqrt(x**2 + 1e-6) ** (exponent - 1)
