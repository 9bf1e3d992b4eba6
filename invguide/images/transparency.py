"""Colours that nobody sees: below alpha 0 they are undefined, and must not leak into what is restored."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from invguide.images.reading import Picture
from invguide.numerics.harmonic import harmonic_extension


def visible(picture: Picture) -> Tensor | None:
    """Return where a picture shows anything at all, (1, H, W) bool; None where that is everywhere, or nowhere."""
    if picture.alpha is None:
        return None
    shown = torch.from_numpy(picture.alpha > 0)[None]
    return None if bool(shown.all()) or not bool(shown.any()) else shown


def without_hidden_colours(picture: Picture) -> Picture:
    """Return the picture with the colours under alpha 0 continued from the visible ones, alpha as it was.

    What editors store there (black, white, a deleted background) would spread into visible pixels with every blur,
    enlargement and denoising. The result keeps the continued colours: a viewer that scales it cannot make a fringe.
    """
    shown = visible(picture)
    if shown is None:
        return picture
    return dataclasses.replace(picture, values=harmonic_extension(picture.values, shown))
