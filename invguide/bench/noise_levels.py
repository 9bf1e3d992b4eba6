"""Estimates of the noise of photos against the noise that was put in: as PNG, JPEG, with bars, clipped."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invguide.bench.protocol import Protocol
from invguide.errors import InputError, suggest
from invguide.images.noise_level import estimate_noise
from invguide.images.picture_files import readable
from invguide.images.reading import read_picture
from invguide.rng import Noise
from invguide.system.tables import Table

LEVELS = (0.01, 0.025, 0.05, 0.1, 0.2)
CONTRAST = 1.8  # of the photos that clip


def _jpeg(quality: int, subsampling: int) -> Callable[[np.ndarray], np.ndarray]:
    def save(pixels: np.ndarray) -> np.ndarray:
        from PIL import Image

        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=subsampling)
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))

    return save


def _bars(pixels: np.ndarray) -> np.ndarray:
    """Black above and below, two fifths of the picture."""
    rows = len(pixels) // 3
    return np.pad(pixels, ((rows, rows), (0, 0), (0, 0)))


def _same(pixels: np.ndarray) -> np.ndarray:
    return pixels


# Name as printed -> what is done to the pixels (H, W, 3) uint8 after the noise.
KINDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "PNG": _same,
    "JPEG 90 4:4:4": _jpeg(90, 0),
    "JPEG 90 4:2:0": _jpeg(90, 2),
    "JPEG 75 4:2:0": _jpeg(75, 2),
    "letterboxed": _bars,
    "clipped": _same,
}


def noise(
    data: str | Path,
    *,
    size: int = 256,
    photos: int = 12,
    folder: str | Path | None = None,
    crop: int = 256,
    levels: Sequence[float] = LEVELS,
    kinds: Sequence[str] = tuple(KINDS),
    seed: int = 0,
) -> Table:
    """Estimate the noise of photos with this package, deepinv and, where it is installed, scikit-image.

    Args:
        data: .npz file with uint8 photos `img_SIZE`.
        size, photos: As for `restore`.
        folder: Of pictures, whose middles are taken too.
        crop: Pixels per side of these.
        levels: Of the noise that is put in, white = 1.
        kinds: Of pictures, see KINDS; "clipped" has its contrast raised first, so that much is black or white.
        seed: Of the noise.

    Returns:
        For each kind the median error of each estimator and the worst one, and of ours the median estimate at each
        level over the level.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise InputError(f"unknown kind {kind!r}; {suggest(kind, KINDS)}")
    if not levels or any(not 0 < level < 1 for level in levels):
        raise InputError(f"levels are {list(levels)}; expected numbers between 0 and 1")
    clean = [*Protocol(Path(data), size, photos).truth, *_middles(folder, crop)]
    estimators = _estimators()
    rows: list[tuple[str, ...]] = []
    figures: dict[str, Any] = {}
    for kind in kinds:
        names = ("invguide", *estimators)
        found = {name: np.full((len(clean), len(levels)), np.nan) for name in names}
        doubted = 0
        for place in np.ndindex(len(clean), len(levels)):
            y = noisy(clean[place[0]], levels[place[1]], kind, seed, place)
            ours = estimate_noise(y)
            doubted += not ours.trusted
            found["invguide"][place] = ours.sigma
            for name, estimate in estimators.items():
                found[name][place] = estimate(y)
        errors = {name: np.abs(each / np.array(levels) - 1) for name, each in found.items()}
        figures[kind] = {name: each.tolist() for name, each in found.items()}
        ratios = np.nanmedian(found["invguide"] / np.array(levels), 0)
        rows.append(
            (
                kind,
                *(f"{np.nanmedian(e):.1%} ({np.nanmax(e):.0%})" for e in errors.values()),
                *(f"{ratio:.2f}" for ratio in ratios),
                str(doubted),
            )
        )
    head = ("picture", "invguide", *estimators, *(f"at {level:g}" for level in levels), "doubted")
    note = (
        f"{len(clean)} photos. Of each estimator the median error (the worst) over photos and levels; of invguide the "
        f"median of estimated over true at each level, and how many it does not trust. True is the noise put in before "
        f"clipping and JPEG."
    )
    return Table(head, tuple(rows), (note,), figures)


def noisy(
    photo: Tensor, level: float, kind: str, seed: int = 0, row: tuple[int, int] = (0, 0)
) -> Tensor:
    """A photo (3, H, W) in [0, 1] with noise of this level as a picture of this kind, (1, 3, H, W), 8 bits."""
    x = (photo - 0.5) * CONTRAST + 0.5 if kind == "clipped" else photo
    y = x.clamp(0, 1) + level * Noise(seed, (row,), tuple(photo.shape))("measurement")[0]
    pixels = (255 * y.clamp(0, 1)).round().byte().permute(1, 2, 0).numpy()
    changed = np.ascontiguousarray(KINDS[kind](pixels).transpose(2, 0, 1))
    return torch.from_numpy(changed)[None].float() / 255


def _estimators() -> dict[str, Callable[[Tensor], float]]:
    """Those of other packages."""
    from deepinv.models import PatchCovarianceNoiseEstimator

    def deepinv(y: Tensor) -> float:
        try:
            return float(PatchCovarianceNoiseEstimator.estimate_noise(y, 6, 1))
        except RuntimeError:  # "Noise level estimation failed."
            return float("nan")

    found: dict[str, Callable[[Tensor], float]] = {"deepinv": deepinv}
    try:
        from skimage.restoration import estimate_sigma  # pyright: ignore[reportMissingImports]
    except ImportError:
        return found
    found["scikit-image"] = lambda y: float(
        estimate_sigma(y[0].numpy(), channel_axis=0, average_sigmas=True)
    )
    return found


def _middles(folder: str | Path | None, crop: int) -> list[Tensor]:
    """The middles of the pictures in a folder, (3, crop, crop), in the order of their names."""
    if folder is None:
        return []
    files = sorted(p for p in Path(folder).glob("*") if p.suffix.lower() in readable())
    if not files:
        raise InputError(f"folder {folder} has no pictures")
    middles = []
    for file in files:
        picture = read_picture(file)
        if picture.grey or min(picture.size) < crop:
            raise InputError(f"{file} is {picture.describe()}; expected colour, {crop} x {crop}")
        top, left = ((n - crop) // 2 for n in picture.size)
        middles.append(picture.values[0, :, top : top + crop, left : left + crop])
    return middles
