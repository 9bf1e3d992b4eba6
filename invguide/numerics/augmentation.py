"""Random views of pictures, drawn for each sample on its own, through which gradients pass back exactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

AUGMENTATIONS = ("flip", "translate", "crop", "cutout")
DRAWS = 8  # uniforms that one view of one picture takes, whichever augmentations it has


def augment(x: Tensor, names: Sequence[str], uniforms: Tensor) -> Tensor:
    """Return a view of each picture, (B, C, H, W) -> (B, C, H, W), linear in x.

    Resampling is linear between pixels, by one matrix for rows and one for columns (so that the way back is
    deterministic on every device); borders are mirrored.

    Args:
        x: Pictures, normalised units.
        names: Any of
            "flip": left and right exchanged, half of the time;
            "translate": by whole pixels, up to an eighth of the picture;
            "crop": to 75 to 100 % of each side, and back to full size;
            "cutout": a rectangle of half of each side is 0.
        uniforms: On [0, 1), (B, DRAWS): what is random about it.
    """
    rows, columns = (
        torch.arange(n, dtype=x.dtype, device=x.device).expand(len(x), n) for n in x.shape[-2:]
    )
    u = uniforms.to(x)
    if "crop" in names:
        rows, columns = _crop(rows, u[:, 0], u[:, 1]), _crop(columns, u[:, 0], u[:, 2])
    if "translate" in names:
        rows, columns = _translate(rows, u[:, 3]), _translate(columns, u[:, 4])
    if "flip" in names:
        columns = torch.where(u[:, 5:6] < 0.5, columns.flip(1), columns)
    view = _interpolation(rows)[:, None] @ x @ _interpolation(columns)[:, None].mT
    if "cutout" in names:
        hole = _middle(x.shape[-2], u[:, 6])[:, :, None] & _middle(x.shape[-1], u[:, 7])[:, None]
        view = view.masked_fill(hole[:, None], 0.0)
    return view


def _crop(positions: Tensor, size: Tensor, place: Tensor) -> Tensor:
    share = (0.75 + 0.25 * size)[:, None]
    return share * positions + (1 - share) * place[:, None] * (positions.shape[1] - 1)


def _translate(positions: Tensor, where: Tensor) -> Tensor:
    return positions + ((2 * where - 1) * (positions.shape[1] / 8)).round()[:, None]


def _interpolation(positions: Tensor) -> Tensor:
    """Matrices (B, n, n) that read a line of n pixels at positions (B, n), mirrored at its ends."""
    n = positions.shape[1]
    inside = (n - 1) - ((n - 1) - positions.abs()).abs()
    pixels = torch.arange(n, dtype=positions.dtype, device=positions.device)
    return (1 - (inside[:, :, None] - pixels).abs()).clamp_min(0.0)


def _middle(n: int, centre: Tensor) -> Tensor:
    """Which of n pixels lie within a quarter of the line around `centre` in [0, 1), (B, n)."""
    pixels = (torch.arange(n, device=centre.device) + 0.5) / n
    return (pixels - centre[:, None]).abs() < 0.25
