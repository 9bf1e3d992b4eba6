"""FileSize: how many kilobytes a picture takes as a JPEG or PNG file."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from invguide.arguments.rules import Number, OneOf, Positive
from invguide.errors import InputError
from invguide.rewards.per_sample import PerSample, check_image

FORMATS = ("jpeg", "png")


@dataclass(frozen=True)
class FileSize(PerSample):
    """-size, or -|size - target|, in kilobytes (1000 bytes) of the picture as Pillow writes it.

    Values in [0, 1] are rounded to 8 bits, others clipped. One channel is written as grey, three as colour; of any
    other number, each channel is a grey file and the sizes add up. Headers count (about 0.6 kB in a JPEG file).

    Args:
        format: "jpeg" or "png". Default "jpeg"; "png" where files keep every value.
        quality: Of a JPEG file, 1 to 100. Default None: Pillow's, 75; lower judges coarse structure only.
        target: Size to aim at, kilobytes of 1000 bytes, above 0. Default None: as small as can be.

    Raises:
        InputError: An unknown format, or a quality or target that cannot be.
        ShapeError: Samples that are not images (C, H, W).

    Example:
        >>> import torch
        >>> flat, noise = FileSize("png")(torch.stack([torch.ones(1, 32, 32), torch.rand(1, 32, 32)]))
        >>> bool(flat > noise)
        True
    """

    format: Annotated[str, OneOf(FORMATS)] = "jpeg"
    quality: Annotated[int, Number(1, 100, whole=True)] | None = None
    target: Positive | None = None

    def __post_init__(self) -> None:
        if self.quality is not None and self.format != "jpeg":
            raise InputError(
                f"quality={self.quality}, but a {self.format} file has none; leave it out"
            )

    def score(self, sample: np.ndarray) -> float:
        check_image(sample, self)
        pixels = np.rint(255 * sample.clip(0, 1)).astype(np.uint8)
        files = [pixels.transpose(1, 2, 0)] if len(pixels) == 3 else pixels
        size = sum(self._bytes(file) for file in files) / 1000
        return -size if self.target is None else -abs(size - self.target)

    def _bytes(self, pixels: np.ndarray) -> int:
        from PIL import Image

        buffer = io.BytesIO()
        options = {} if self.quality is None else {"quality": self.quality}
        Image.fromarray(pixels).save(buffer, self.format, **options)
        return buffer.tell()
