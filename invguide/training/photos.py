"""Photos for training: read an archive or a folder once, serve random crops at mixed scales."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SCALES = (1.0, 0.75, 0.5)
SUFFIXES = (".jpg", ".jpeg", ".png")
HELD_OUT_EVERY = 50


def load_photos(path: str | Path) -> list[Image.Image]:
    """Read every photo of a zip archive or a folder (recursively) as RGB, in the order of their names."""
    path = Path(path)
    if path.is_dir():
        names = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        photos = [Image.open(p).convert("RGB") for p in names]
    else:
        with zipfile.ZipFile(path) as archive:
            members = sorted(n for n in archive.namelist() if n.lower().endswith(SUFFIXES))
            photos = [Image.open(io.BytesIO(archive.read(n))).convert("RGB") for n in members]
    if not photos:
        raise ValueError(
            f"no photo found in {path}: expected a zip archive or folder of {', '.join(SUFFIXES)} files"
        )
    return photos


def split_photos(photos: list[Image.Image]) -> tuple[list[Image.Image], list[Image.Image]]:
    """Split into training photos and held-out photos (one in every HELD_OUT_EVERY)."""
    held_out = photos[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    return [p for i, p in enumerate(photos) if (i + 1) % HELD_OUT_EVERY], held_out


def centre_crops(photos: list[Image.Image], size: int) -> Tensor:
    """Centre square of each photo that is large enough: (N, 3, size, size) in [-1, 1]."""
    crops = []
    for photo in photos:
        left, top = (photo.width - size) // 2, (photo.height - size) // 2
        if min(left, top) >= 0:
            crops.append(np.asarray(photo.crop((left, top, left + size, top + size))))
    return to_unit(torch.from_numpy(np.stack(crops)))


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 (N, H, W, 3) to float (N, 3, H, W) in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


class Crops:
    """Random crops, mirrored at random, from a small pyramid of every photo."""

    def __init__(self, photos: list[Image.Image]) -> None:
        self.pyramid: list[list[np.ndarray]] = []
        for scale in SCALES:
            resized = (
                p
                if scale == 1
                else p.resize(
                    (round(p.width * scale), round(p.height * scale)), Image.Resampling.LANCZOS
                )
                for p in photos
            )
            self.pyramid.append([np.asarray(p) for p in resized])

    def batch(self, rng: np.random.Generator, count: int, size: int) -> Tensor:
        """Draw `count` crops, (count, 3, size, size) in [-1, 1]; scales are chosen in proportion to their area."""
        usable = [
            level for level in self.pyramid if min(min(a.shape[:2]) for a in level[:200]) >= size
        ]
        weights = np.array([np.mean([a.size for a in level[:200]]) for level in usable])
        levels = rng.choice(len(usable), count, p=weights / weights.sum())
        crops = np.empty((count, size, size, 3), np.uint8)
        for i, level in enumerate(levels):
            image = usable[level][rng.integers(len(usable[level]))]
            if min(image.shape[:2]) < size:
                raise ValueError(
                    f"a training photo of {image.shape[1]}x{image.shape[0]} is smaller than the crop {size}"
                )
            top, left = (
                rng.integers(image.shape[0] - size + 1),
                rng.integers(image.shape[1] - size + 1),
            )
            crop = image[top : top + size, left : left + size]
            crops[i] = crop[:, ::-1] if rng.random() < 0.5 else crop
        return to_unit(torch.from_numpy(crops))
