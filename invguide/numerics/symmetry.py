"""The eight mirror images and quarter turns of pictures (..., H, W)."""

from __future__ import annotations

from torch import Tensor

SYMMETRIES = 8


def turn_image(x: Tensor, k: int) -> Tensor:
    """Return the k-th symmetry of x, k = 0 ... 7; 0 changes nothing, 4 and above exchange height and width."""
    x = x.flip(-1) if k & 1 else x
    x = x.flip(-2) if k & 2 else x
    return x.mT.contiguous() if k & 4 else x


def turn_back(x: Tensor, k: int) -> Tensor:
    """Undo `turn_image(x, k)`."""
    x = x.mT.contiguous() if k & 4 else x
    x = x.flip(-2) if k & 2 else x
    return x.flip(-1) if k & 1 else x
