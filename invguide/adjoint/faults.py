"""What can be wrong with a loss, a state or a network that gradients go through, said before they are wrong."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from invguide.arguments.rules import shown
from invguide.errors import InputError, ShapeError
from invguide.numerics.linear import norm


def _check_deterministic(again: Tensor, first: Tensor) -> None:
    # A GPU may add in another order; dropout or fresh noise differ by far more. NaN is for the caller to find.
    limit = 1e-2 if again.dtype in (torch.float16, torch.bfloat16) else 1e-3
    if bool((norm(again - first) > limit * norm(first) + 1e-12).any()):
        raise InputError(
            "the denoiser gave two answers for the same x and sigma, so the roll-out has no gradient; put the network "
            "in evaluation mode (dropout off), or take the randomness out of it"
        )


def _check_states(x: Tensor) -> None:
    if not x.is_floating_point() or x.ndim < 2:
        raise InputError(
            f"x is {shown(x)}; expected floating-point states (B, *shape), batch first"
        )


def check_loss(loss: Callable[[Tensor], Tensor], x0: Tensor) -> Tensor:
    """Return loss(x0), (B,), after all that can be wrong with it was looked at: see `rollout_gradient`."""
    version = x0._version
    value = loss(x0)
    if not isinstance(value, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"the loss returned a {type(value).__name__}; expected a tensor (B,)")
    if value.shape != (len(x0),):
        raise ShapeError(
            f"the loss returned shape {tuple(value.shape)} for {len(x0)} samples; expected ({len(x0)},), one value each"
        )
    if value.is_complex():
        raise InputError(
            "the loss returned complex numbers; expected real ones, such as abs() or real"
        )
    if x0._version != version:
        raise InputError(
            "the loss changes its input in place; write x = x * 2, not x *= 2, and clamp, not clamp_"
        )
    if not bool(torch.isfinite(value).all()):
        bad = int((~torch.isfinite(value)).nonzero()[0])
        cause = (
            ""
            if bool(torch.isfinite(x0[bad]).all())
            else ", but the roll-out's end is not finite itself"
        )
        raise InputError(
            f"the loss of sample {bad} is {value[bad].item()}; expected a finite number for every clean signal{cause}"
        )
    if not value.requires_grad:
        _check_slope(None)
    return value


def _check_slope(slope: Tensor | None) -> None:
    """Raise InputError unless the loss has a gradient where the roll-out ends."""
    if slope is None:
        raise InputError(
            "the gradient of the loss is None: it is constant, or detached from its input (numpy, detach, argmax, "
            "no_grad); use differentiable torch operations, or as_reward(function, differentiable=False) and a solver "
            "for black boxes: SCG, FeynmanKac, DPSZerothOrder"
        )
    bad = ~torch.isfinite(slope.flatten(1)).all(1)
    if bool(bad.any()):
        raise InputError(
            f"the gradient of the loss of sample {int(bad.nonzero()[0])} is not finite, though its value is (a square "
            f"root or norm at 0?); add a small number before the root, or clamp"
        )
