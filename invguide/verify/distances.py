"""Distances between samples and an exact law; each has a Monte Carlo floor that is above zero."""

from __future__ import annotations

import torch
from torch import Tensor

from invguide.errors import ShapeError
from invguide.sampling.particles import systematic


def sliced_wasserstein(a: Tensor, b: Tensor, projections: int = 100, seed: int = 0) -> float:
    """Return the mean over random directions of the 1-D Wasserstein-1 distance.

    W1 is the area between the two empirical distribution functions, so the counts may differ.
    This is the metric of Cardoso et al. 2024 (arXiv 2308.07983), table 1. It is of order one and
    not squared: do not compare it with sliced W2, which weighs misplaced far modes more.

    Args:
        a, b: Samples, (n, *shape) and (m, *shape), in the same units.
        projections: Number of directions, uniform on the sphere.
        seed: Of the directions.

    Raises:
        ShapeError: If the samples have different shapes, or one set is empty.
    """
    if a.shape[1:] != b.shape[1:] or a.ndim < 2 or not len(a) or not len(b):
        raise ShapeError(
            f"a and b must be (n, *shape) and (m, *shape) with the same shape, "
            f"got {tuple(a.shape)} and {tuple(b.shape)}."
        )
    a, b = a.double().flatten(1), b.double().flatten(1)
    source = torch.Generator().manual_seed(seed)
    directions = torch.randn(projections, a.shape[1], generator=source, dtype=torch.float64)
    directions = (directions / directions.norm(dim=1, keepdim=True)).to(a.device)
    u, v = ((directions @ samples.mT).sort(dim=1).values for samples in (a, b))
    if len(a) == len(b):  # the sorted samples are each other's optimal partners
        return float((u - v).abs().mean())
    levels = torch.cat([u, v], dim=1).sort(dim=1).values
    below = [torch.searchsorted(s, levels[:, :-1].contiguous(), right=True) for s in (u, v)]
    gap = (below[0].double() / len(a) - below[1].double() / len(b)).abs()
    return float((gap * levels.diff(dim=1)).sum(1).mean())


def mean_error(samples: Tensor, mean: Tensor, std: Tensor) -> float:
    """Return the rms over entries of (sample mean - mean) / std; exact samples give 1 / sqrt(n).

    Args:
        samples: (n, *shape).
        mean, std: Of the exact law, (*shape).
    """
    return float(((samples.mean(0) - mean) / std).square().mean().sqrt())


def std_ratio(samples: Tensor, std: Tensor) -> tuple[float, float, float]:
    """Return sample std / exact std over entries: geometric mean, smallest, largest.

    Args:
        samples: (n, *shape), n >= 2.
        std: Of the exact law, (*shape).
    """
    ratio = samples.std(0) / std
    return float(ratio.log().mean().exp()), float(ratio.min()), float(ratio.max())


def unweighted(samples: Tensor, weights: Tensor) -> Tensor:
    """Return as many samples of equal weight: i appears n w_i times, up to rounding; no randomness.

    Args:
        samples: (n, *shape).
        weights: (n,), summing to 1.
    """
    if bool((weights == weights[:1]).all()):
        return samples
    return samples[systematic(weights.log(), weights.new_tensor(0.5))]
