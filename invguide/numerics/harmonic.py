"""Continue an image into its unknown pixels as smoothly as can be: the harmonic extension, by multigrid."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SWEEPS, DAMPING = 2, 0.8  # of Jacobi's method, before and after each coarser grid
MAX_ITERATIONS = (
    100  # of conjugate gradients; ten to twenty suffice for holes of any size and shape
)


class _Grid(NamedTuple):
    """One level of the pyramid."""

    hole: Tensor  # (H, W), 1 where a value is unknown, else 0
    degree: Tensor  # (H, W), neighbours inside the image, at least 1


def harmonic_extension(values: Tensor, known: Tensor, tolerance: float = 1e-5) -> Tensor:
    """Return values whose unknown pixels are the mean of their neighbours: discrete Laplace equation, known at its rim.

    Each unknown pixel is the mean of its two to four neighbours inside the image (no flux through the image's edges),
    which is the smoothest continuation: it minimises the sum of squared differences of neighbours. Conjugate gradients
    with a multigrid V-cycle as preconditioner (Tatebe 1993), so that the time is proportional to the number of pixels.

    Args:
        values: (B, C, H, W); what unknown pixels hold does not matter, NaN included.
        known: (H, W) or (1, H, W), nonzero where values are known; at least one pixel is.
        tolerance: Of the remaining error in the energy norm, relative to that of zero.

    Returns:
        (B, C, H, W), the known pixels unchanged bit for bit.
    """
    hole = known.reshape(known.shape[-2:]) == 0
    if not bool(hole.any()):
        return values
    rows, columns = hole.any(1).nonzero().flatten(), hole.any(0).nonzero().flatten()
    box = tuple(
        slice(max(int(i[0]) - 1, 0), min(int(i[-1]) + 2, n))
        for i, n in ((rows, hole.shape[0]), (columns, hole.shape[1]))
    )
    inside = hole[box]
    grids = _pyramid(inside.to(values))
    rim = torch.where(inside, 0, values[(..., *box)])
    result = values.clone(memory_format=torch.contiguous_format)  # its planes are views
    # Plane by plane: the solver holds about ten times what it is given.
    for plane, filled in zip(rim.flatten(0, 1), result.flatten(0, 1), strict=True):
        found = _solve(grids, _neighbours(plane) * grids[0].hole, tolerance)
        filled[box] = torch.where(inside, found, plane)
    return result


def _pyramid(hole: Tensor) -> list[_Grid]:
    """Grids of half the size each; a coarse pixel is unknown where all it covers is, until none is left."""
    grids = []
    while bool(hole.any()):
        grids.append(_Grid(hole, _neighbours(torch.ones_like(hole)).clamp(min=1)))
        padded = F.pad(hole[None, None], (0, hole.shape[1] % 2, 0, hole.shape[0] % 2), value=1.0)
        hole = -F.max_pool2d(-padded, 2)[0, 0]
    return grids


def _neighbours(u: Tensor) -> Tensor:
    """The sum over the upper, lower, left and right neighbour inside the image, (..., H, W)."""
    total = torch.zeros_like(u)
    total[..., 1:, :] += u[..., :-1, :]
    total[..., :-1, :] += u[..., 1:, :]
    total[..., :, 1:] += u[..., :, :-1]
    total[..., :, :-1] += u[..., :, 1:]
    return total


def _laplace(grid: _Grid, u: Tensor) -> Tensor:
    """The sum of u - neighbour at unknown pixels, for u that is 0 at known ones."""
    return (grid.degree * u - _neighbours(u)) * grid.hole


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum()


def _solve(grids: list[_Grid], rhs: Tensor, tolerance: float) -> Tensor:
    """Conjugate gradients on one plane, (H, W)."""
    u, residual = torch.zeros_like(rhs), rhs
    z = _cycle(grids, 0, residual)
    p, rz = z, _dot(residual, z)
    goal = tolerance**2 * rz
    for _ in range(MAX_ITERATIONS):
        if bool(rz <= goal):
            break
        step = _laplace(grids[0], p)
        alpha = rz / _dot(p, step).clamp(min=torch.finfo(rhs.dtype).tiny)
        u, residual = u + alpha * p, residual - alpha * step
        z = _cycle(grids, 0, residual)
        new = _dot(residual, z)
        p, rz = z + new / rz.clamp(min=torch.finfo(rhs.dtype).tiny) * p, new
    return u


def _cycle(grids: list[_Grid], level: int, rhs: Tensor) -> Tensor:
    """One V-cycle from zero; symmetric and positive, since both smoothings and both transfers are transposes."""
    grid = grids[level]
    weight = DAMPING / grid.degree * grid.hole
    u = weight * rhs
    for _ in range(SWEEPS - 1):
        u = u + weight * (rhs - _laplace(grid, u))
    if level + 1 < len(grids):
        coarser = _restrict(rhs - _laplace(grid, u)) * grids[level + 1].hole
        correction = _prolong(_cycle(grids, level + 1, coarser), grid.hole.shape)
        u = u + correction * grid.hole
    for _ in range(SWEEPS):
        u = u + weight * (rhs - _laplace(grid, u))
    return u


def _prolong(u: Tensor, size: tuple[int, ...] | torch.Size) -> Tensor:
    """Bilinear between the centres of coarse pixels, (..., H, W) at twice the size, cut to it."""
    for axis in (-2, -1):
        n = u.shape[axis]
        before = torch.cat([u.narrow(axis, 0, 1), u.narrow(axis, 0, n - 1)], axis)
        after = torch.cat([u.narrow(axis, 1, n - 1), u.narrow(axis, n - 1, 1)], axis)
        pairs = torch.stack([0.75 * u + 0.25 * before, 0.75 * u + 0.25 * after], axis % u.ndim + 1)
        u = pairs.flatten(axis % u.ndim, axis % u.ndim + 1).narrow(axis, 0, size[axis])
    return u


def _restrict(u: Tensor) -> Tensor:
    """The transpose of `_prolong`."""
    for axis in (-2, -1):
        if u.shape[axis] % 2:
            u = torch.cat([u, torch.zeros_like(u.narrow(axis, 0, 1))], axis)
        n = u.shape[axis] // 2
        even, odd = u.unflatten(axis, (n, 2)).unbind(axis % u.ndim + 1)
        total = 0.75 * (even + odd)
        total.narrow(axis, 0, n - 1).add_(0.25 * even.narrow(axis, 1, n - 1))
        total.narrow(axis, 1, n - 1).add_(0.25 * odd.narrow(axis, 0, n - 1))
        total.narrow(axis, 0, 1).add_(0.25 * even.narrow(axis, 0, 1))
        total.narrow(axis, n - 1, 1).add_(0.25 * odd.narrow(axis, n - 1, 1))
        u = total
    return u
