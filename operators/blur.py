"""Blur by a kernel of your own."""

from __future__ import annotations

from torch import Tensor

from ._convolution import Convolution
from ._separable import Padding


class Blur(Convolution):
    """Convolution of every channel with one kernel, y(i) = sum_j kernel(j) x(i - j).

    Args:
        kernel: (H, W) in pixels, both odd, centred, summing to 1; another sum is divided out with a warning.
        padding: How the image goes on beyond its edges. "reflect" (the edge pixel repeated, as in `scipy.ndimage`) and
            "circular" keep the size; "valid" keeps only what needs no guess. Default "reflect"; "circular" for periodic
            signals, "valid" where y is smaller than x.

    Raises:
        InputError: The kernel sums to zero or is not finite; unknown padding.
        ShapeError: A kernel of even size or of another rank; an image smaller than the kernel.

    Example:
        >>> import torch
        >>> Blur(torch.full((3, 5), 1 / 15), padding="valid")(torch.ones(1, 3, 8, 10)).shape
        torch.Size([1, 3, 6, 6])
    """

    def __init__(self, kernel: Tensor, padding: Padding = "reflect") -> None:
        super().__init__(kernel, padding)
