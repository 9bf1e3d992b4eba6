"""Checks that the differentiable rewards of pictures share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from invguide.errors import InputError, ShapeError


def check_images(owner: object, x: Tensor, channels: int | None = None, minimum: int = 1) -> None:
    """Raise unless x is a batch (N, C, H, W) with these channels and at least `minimum` pixels along each side."""
    name, shape = type(owner).__name__, tuple(x.shape)
    if x.ndim != 4:
        raise ShapeError(
            f"{name} was given a batch of shape {shape}; expected images (N, C, H, W)"
        )
    if channels is not None and shape[1] != channels:
        raise ShapeError(f"{name} was given images of {shape[1]} channels; expected {channels}")
    if min(shape[2:]) < minimum:
        raise ShapeError(
            f"{name} was given images of {shape[2]} x {shape[3]} pixels; expected at least {minimum} x {minimum}"
        )


def read_reference(owner: object, reference: Any) -> Tensor:
    """Return a copy of the reference, a tensor or array, as a tensor of finite floating-point numbers."""
    name = type(owner).__name__
    try:
        copy = torch.as_tensor(reference).detach().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{name}: the reference is a {type(reference).__name__}; expected an image (C, H, W), a tensor or array"
        ) from error
    if not copy.is_floating_point():
        raise InputError(
            f"{name}: the reference holds {copy.dtype} values; expected floats in data units: reference.float() / 255"
        )
    if not bool(torch.isfinite(copy).all()):
        raise InputError(f"{name}: the reference has NaN or infinite values")
    return copy


def require_image(owner: object, reference: Tensor) -> Tensor:
    """Return the reference, or raise ShapeError unless it is one picture (C, H, W)."""
    if reference.ndim != 3 or not reference.numel():
        fix = ": drop the batch axis with reference[0]" if reference.ndim == 4 else ""
        raise ShapeError(
            f"{type(owner).__name__}: the reference has shape {tuple(reference.shape)}; expected one image (C, H, W)"
            f"{fix}"
        )
    return reference
