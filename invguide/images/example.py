"""The photograph that ships with the package."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from invguide.arguments.checks import checked
from invguide.images.reading import read_picture

PHOTO = Path(__file__).parents[1] / "data" / "chelsea.png"


@checked
def example_photo() -> Tensor:
    """Return a photograph of a cat, (1, 3, 192, 192) in [0, 1], by Stefan van der Walt, public domain (CC0)."""
    return read_picture(PHOTO).values
