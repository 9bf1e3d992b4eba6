"""Signals to try an operator on, and how far two answers of it are apart."""

from __future__ import annotations

import torch
from torch import Tensor

from invguide.errors import InputError
from invguide.numerics.linear import norm


def signals(
    shape: tuple[int, ...] | None, x: Tensor | None, count: int, seed: int
) -> tuple[Tensor, torch.Generator]:
    """Return x, at least two rows, or `count` random signals of `shape`, and the generator of what else is random."""
    if (shape is None) == (x is None):
        raise InputError(
            "check needs either shape=(...), one sample without the batch axis, or x=(B, *shape)"
        )
    generator = torch.Generator().manual_seed(seed)
    if x is None:
        assert shape is not None
        return torch.rand((count, *shape), generator=generator), generator
    x = x.detach()
    return (torch.cat([x, x.flip(-1)]) if len(x) == 1 else x), generator


def ratio(error: Tensor, size: Tensor) -> Tensor:
    """error / size, 0 where both are 0 and infinite where either is not finite."""
    return (error / size.clamp_min(torch.finfo(size.dtype).tiny)).nan_to_num(float("inf"))


def relative(a: Tensor, b: Tensor) -> float:
    return ratio(norm(a - b), norm(b)).max().item()


def difference(a: Tensor, b: Tensor, tolerance: float) -> tuple[bool, str]:
    error = relative(a, b)
    return error <= tolerance, "yes" if error == 0 else f"relative difference {error:.1e}"


def rounded(y: Tensor) -> float:
    """Return which part of the values that are not zero is exact in single precision: 2^-29 of random ones is."""
    single = y.to(torch.complex64 if y.is_complex() else torch.float32).to(y)
    values = y != 0
    return ((single == y) & values).sum().item() / max(1, int(values.sum()))


def finite(y: Tensor) -> tuple[bool, str]:
    bad = int((~torch.isfinite(y)).sum())
    return bad == 0, "yes" if bad == 0 else f"{bad} of {y.numel()} values are NaN or infinite"


def brief(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text if len(text) <= 100 else text[:97] + '...'}"
