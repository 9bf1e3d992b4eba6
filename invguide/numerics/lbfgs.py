"""Limited-memory BFGS for a batch of functions: each sample has its own history, and none looks at its neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from invguide.numerics.linear import inner, norm, per_sample


def newton_step(gradient: Tensor, steps: Tensor, turns: Tensor) -> Tensor:
    """Return -H g by the two-loop recursion (Nocedal and Wright 2006, "Numerical optimization", alg. 7.4).

    Args:
        gradient: g, (B, *shape).
        steps, turns: Last differences of points and gradients, (B, m, *shape), newest last; zeros are no entries.
            Without any, H is the identity.
    """
    g, s, y = gradient.flatten(1), steps.flatten(2), turns.flatten(2)
    curvature = (s * y).sum(2)
    known = curvature > 0
    rho = torch.where(known, 1 / curvature.where(known, 1.0), 0.0)[..., None]
    size = torch.where(
        known[:, -1], curvature[:, -1] / (y[:, -1] ** 2).sum(1).clamp_min(1e-30), 1.0
    )
    alphas: list[Tensor] = []
    for i in reversed(range(s.shape[1])):
        alphas.append(rho[:, i] * (s[:, i] * g).sum(1, keepdim=True))
        g = g - alphas[-1] * y[:, i]
    g = size[:, None] * g
    for i, alpha in enumerate(reversed(alphas)):
        beta = rho[:, i] * (y[:, i] * g).sum(1, keepdim=True)
        g = g + (alpha - beta) * s[:, i]
    return -g.reshape(gradient.shape)


def remember(
    steps: Tensor, turns: Tensor, step: Tensor, turn: Tensor, moved: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the histories with one more entry in the rows that moved (B,) and where the function bends upwards."""
    # Beside functions of order one, less curvature than 1e-20 is rounding, and its inverse would overflow.
    bends = inner(step, turn) > (1e-8 * norm(step) * norm(turn)).clamp_min(1e-20)
    push = per_sample((moved & bends).to(steps.dtype), steps) > 0
    return (
        torch.where(push, torch.cat([steps[:, 1:], step[:, None]], 1), steps),
        torch.where(push, torch.cat([turns[:, 1:], turn[:, None]], 1), turns),
    )


def shorten(length: Tensor, slope: Tensor, rise: Tensor) -> Tensor:
    """Return the next length to try, (B,): the lowest point of the parabola with this slope at 0 and rise at length."""
    best = -slope * length**2 / (2 * (rise - slope * length))
    return torch.clamp(best.nan_to_num(0.0, 0.0, 0.0), 0.1 * length, 0.5 * length)
