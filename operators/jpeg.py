"""JPEG compression."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from invguide.arguments.rules import Number
from invguide.forward_operator import Operator

from ._images import check_images


class JPEG(Operator):
    """Compress to JPEG and decode, any size, 3 channels (colour, 4:2:0) or 1 (grey); images in [0, 1].

    Kornia's differentiable codec: where JPEG rounds a coefficient c to r, it keeps r + (c - r)^3. So the result
    is near a file's and not equal to it, and the gradient, 3 (c - r)^2 per coefficient, is a quarter of the true slope
    on average: solvers need a larger guidance scale. Values outside of [0, 1] are coded as they are, which a file
    cannot; the decoded image is cut off to [0, 1].

    Args:
        quality: Of the file, 1 (smallest) to 100, as the encoder was told.

    Raises:
        InputError: quality out of range.
        ShapeError: Not images (B, 3 or 1, H, W).

    Example:
        >>> import torch
        >>> JPEG(quality=30)(torch.rand(2, 3, 20, 33)).shape
        torch.Size([2, 3, 20, 33])
    """

    def __init__(self, quality: Annotated[float, Number(1, 100)]) -> None:
        super().__init__()
        self.quality = quality

    def forward(self, x: Tensor) -> Tensor:
        from kornia.enhance import jpeg_codec_differentiable

        check_images(self, x, channels=1 if x.ndim == 4 and x.shape[1] == 1 else 3)
        quality = x.new_full((x.shape[0],), self.quality)
        # Grey has constant chroma, which JPEG keeps exactly, so the mean of three equal channels loses nothing.
        coded = jpeg_codec_differentiable(x.expand(-1, 3, -1, -1), quality)
        return coded if x.shape[1] == 3 else coded.mean(1, keepdim=True)

    def input_shape(self, y_shape: tuple[int, ...]) -> tuple[int, ...]:
        return y_shape

    def extra_repr(self) -> str:
        return f"quality={self.quality:g}"
