"""Masks from picture files: black and white, any two values, soft edges, or the alpha channel."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invguide.errors import InputError, ShapeError
from invguide.images.reading import Picture, read_picture
from invguide.operators import Grayscale

FULL = 0.95  # of the way from the darkest to the brightest value: nearly white is white, for the sake of JPEG
CONTRAST = 0.25  # of the range: what has greys and less contrast is no mask
EDGE = 0.01  # of the longer side, at least 4 pixels: how far from black or white a grey of a soft edge may be
FEW = 0.3  # of the pixels: so few known ones in one piece are more likely the hole of another program
SOFT = 0.25  # of the pixels: more greys are no edges


def read_mask(path: Path, size: tuple[int, int], invert: bool = False) -> Tensor:
    """Return a mask (1, H, W), True where pixels are known: where the picture is white, or opaque if alpha varies.

    Two values are black and white whatever they are. Greys along edges, as of a soft brush or of JPEG, are pixels that
    are partly painted over: they count as missing, and how many there are is said. Other greys are refused: weights
    between 0 and 1 would need to say how noisy those pixels are, which a mask does not tell.

    Args:
        path: A picture.
        size: (height, width) that it must have.
        invert: Black, or transparent, is known.

    Raises:
        InputError: Unreadable, no mask, or nothing or everything known.
        ShapeError: Not of this size.
    """
    picture = read_picture(path)
    if picture.size != size:
        raise ShapeError(
            f"mask {path} is {picture.size[1]} x {picture.size[0]} pixels and the picture {size[1]} x {size[0]}; "
            f"they must be equal: resize the mask (nearest neighbour)"
        )
    levels, white, black = _levels(picture, path)
    white = black if invert else white
    known = _known(levels, invert, path)
    if bool(known.all()):
        raise InputError(
            f"mask {path} marks every pixel as known ({white}), so nothing is missing: use --task denoise"
        )
    if not bool(known.any()):
        raise InputError(
            f"mask {path} marks no pixel as known ({white}); is it the other way round? "
            f"{'Leave --invert-mask out' if invert else 'Use --invert-mask'}"
        )
    if not invert:
        _warn_if_reversed(known, path)
    return known[None]


def _warn_if_reversed(known: Tensor, path: Path) -> None:
    """Say so where little is known, in one piece: other programs paint white what is missing."""
    from scipy.ndimage import distance_transform_cdt

    share = float(known.double().mean())
    if share > FEW:
        return
    distances: Any = distance_transform_cdt(known.numpy(), "chessboard")
    if int(distances.max()) > _edge(known):
        warnings.warn(
            f"mask {path} leaves {share:.1%} of the picture as known (white), and the rest is made up; if it is the "
            f"other way round, use --invert-mask"
        )


def _levels(picture: Picture, path: Path) -> tuple[Tensor, str, str]:
    """Return (H, W) in [0, 1], 1 where known, and the words for 1 and 0."""
    values = picture.values
    luma = (values if picture.grey else Grayscale()(values))[0, 0]
    alpha = picture.alpha
    if alpha is None:
        return luma, "white", "black"
    top = np.iinfo(alpha.dtype).max if alpha.dtype.kind == "u" else 1.0
    opacity = torch.from_numpy(alpha.astype(np.float32)) / float(top)
    low, high = float(opacity.min()), float(opacity.max())
    if low == high or low >= FULL or high <= 1 - FULL:
        return luma, "white", "black"
    shown = luma[opacity > 0.5].unique()
    if len(shown) == 2 and float(shown[0]) <= 1 - FULL and float(shown[1]) >= FULL:
        warnings.warn(f"mask {path}: pixels count as missing where they are black or transparent")
        return luma * opacity, "opaque white", "black or transparent"
    share = float((opacity >= FULL).double().mean())
    warnings.warn(
        f"mask {path} is taken from its alpha channel: the {share:.1%} of pixels that are opaque are known, or missing "
        f"with --invert-mask; its colours are not used"
    )
    return opacity, "opaque", "transparent"


def _known(levels: Tensor, invert: bool, path: Path) -> Tensor:
    """(H, W) booleans: which levels are white, or black; greys are judged by where they are."""
    values = levels.unique()
    low, high = float(values[0]), float(values[-1])
    if len(values) == 2:
        if low > 1 - FULL or high < FULL:
            warnings.warn(
                f"mask {path} has the two values {low:.3g} and {high:.3g} (white = 1), taken for black and white"
            )
        return levels == (low if invert else high)
    if low >= FULL or high <= 1 - FULL or low == high:  # all of it is white, or black
        return (levels > 0.5) != invert
    if high - low < CONTRAST:
        raise InputError(
            f"mask {path} has values from {low:.3g} to {high:.3g} (white = 1), hardly apart; expected black where "
            f"pixels are missing and white where they are known: raise its contrast"
        )
    share = (levels - low) / (high - low)
    share = 1 - share if invert else share
    known = share >= FULL
    grey = ~known & (share > 1 - FULL)
    if not bool(grey.any()):
        return known
    _check_soft(grey, path)
    known &= ~_fringe(share)
    grey = ~known & (share > 1 - FULL)
    warnings.warn(
        f"mask {path} has soft edges: {int(grey.sum())} pixels ({float(grey.double().mean()):.2%}) are grey and "
        f"count as missing"
    )
    return known


def _fringe(share: Tensor) -> Tensor:
    """What is not quite white near a darker pixel: a brush, or what scaled the mask, touched it too."""
    from scipy.ndimage import distance_transform_cdt

    distances: Any = distance_transform_cdt((share >= FULL).numpy(), "chessboard")
    return (share < 1) & torch.from_numpy(distances <= _edge(share))


def _edge(mask: Tensor) -> int:
    """How wide a soft edge may be, pixels."""
    return max(4, round(EDGE * max(mask.shape)))


def _check_soft(grey: Tensor, path: Path) -> None:
    """Raise InputError unless these pixels (H, W) form thin edges."""
    from scipy.ndimage import distance_transform_cdt

    distances: Any = distance_transform_cdt(grey.numpy(), "chessboard")
    depth = int(distances.max())
    share = float(grey.double().mean())
    if share <= SOFT and depth <= _edge(grey):
        return
    raise InputError(
        f"mask {path} is grey in {share:.0%} of its pixels, up to {depth} pixels away from black and white, so these "
        f"are no soft edges (is it a photograph?); expected black where pixels are missing and white where they are "
        f"known: threshold it in an editor, and save it as PNG"
    )
