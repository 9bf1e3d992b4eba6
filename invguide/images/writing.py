"""Pictures written in the kind of the picture that they come from: channels, alpha, bits, profile."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from invguide.errors import InputError
from invguide.images import profiles
from invguide.images.keepsakes import Keepsakes
from invguide.images.reading import Picture
from invguide.images.tiff_file import write_float_tiff


def write_picture(
    path: str | Path, values: Tensor | np.ndarray, like: Picture | None = None
) -> Path:
    """Write (C, H, W) or (1, C, H, W) values, 1 = white, as PNG; floating-point pictures as TIFF.

    Args:
        path: Its suffix is replaced.
        values: Cut off to [0, 1] unless written as floating point; NaN becomes black.
        like: Bits, alpha (resized where the size differs), colour profile (where it fits) and whether grey is stored
            as R = G = B; 8 bit without.
    """
    array = torch.as_tensor(values).detach().cpu().double().numpy()
    array = array[0] if array.ndim == 4 else array
    if array.ndim != 3 or len(array) not in (1, 3):
        raise InputError(f"a picture has 1 or 3 channels (C, H, W); got the shape {array.shape}")
    like = like or Picture(torch.zeros(1, len(array), *array.shape[1:]))
    array = np.nan_to_num(array, nan=0.0, posinf=1.0, neginf=0.0).transpose(1, 2, 0)
    array = array.repeat(3, axis=-1) if like.rgb and array.shape[-1] == 1 else array
    alpha = None if like.alpha is None else _resize_alpha(like.alpha, array.shape[:2])
    profile = like.profile if profiles.fits(like.profile, array.shape[-1]) else None
    path = Path(path).with_suffix(like.suffix)
    if like.bits == 32:
        pixels = array if alpha is None else np.concatenate([array, alpha[..., None]], axis=-1)
        write_float_tiff(path, pixels, profile, like.kept)
        return path
    kind = np.uint16 if like.bits == 16 else np.uint8
    pixels = np.rint(array.clip(0, 1) * np.iinfo(kind).max).astype(kind)
    if alpha is not None:
        pixels = np.concatenate([pixels, alpha.astype(kind)[..., None]], axis=-1)
    path.write_bytes(encode_png(pixels, profile, like.kept))
    return path


def _resize_alpha(alpha: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if alpha.shape == size:
        return alpha
    from PIL import Image

    resized = Image.fromarray(alpha.astype(np.float32)).resize(
        (size[1], size[0]), Image.Resampling.BICUBIC
    )
    if alpha.dtype.kind == "f":
        return np.asarray(resized).clip(0, 1)
    return np.rint(np.asarray(resized)).clip(0, np.iinfo(alpha.dtype).max).astype(alpha.dtype)


def encode_png(
    pixels: np.ndarray, profile: bytes | None = None, kept: Keepsakes | None = None
) -> bytes:
    """Return a PNG file of pixels (H, W, C), uint8 or uint16, C = 1 to 4 with alpha last; PIL cannot write 16 bits."""
    height, width, channels = pixels.shape
    depth = 8 * pixels.dtype.itemsize
    data = np.ascontiguousarray(pixels.astype(pixels.dtype.newbyteorder(">"))).view(np.uint8)
    data = data.reshape(height, -1)
    step = channels * depth // 8
    left = np.pad(data, ((0, 0), (step, 0)))[:, : data.shape[1]]
    rows = np.concatenate(
        [np.ones((height, 1), np.uint8), data - left], axis=1
    )  # filter 1: minus the left pixel

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    kept = kept or Keepsakes()
    per_metre = None if kept.dpi is None else [round(v / 0.0254) for v in kept.dpi]
    parts = [
        b"\x89PNG\r\n\x1a\n",
        chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)),
        chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(profile)) if profile else b"",
        chunk(b"pHYs", struct.pack(">IIB", *per_metre, 1)) if per_metre else b"",
        chunk(b"eXIf", kept.exif) if kept.exif else b"",
        chunk(b"IDAT", zlib.compress(rows.tobytes(), 6)),
        chunk(b"IEND", b""),
    ]
    return b"".join(parts)
