"""One picture file in the format that its name asks for."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np

from invguide.errors import InputError
from invguide.images.picture_files import readable
from invguide.images.reading import Picture, read_picture

WRITTEN = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")
QUALITY = 95  # of a JPEG from another format, or from a worse one: what was restored is not thrown away again


def picture_name(out: Path) -> bool:
    """Whether an output is meant to be one picture file, and not a folder.

    Raises:
        InputError: A picture of a format that is not written.
    """
    suffix = out.suffix.lower()
    if out.is_dir() or suffix not in readable():
        return False
    if readable()[suffix] not in WRITTEN:
        able = ", ".join(s for s, name in readable().items() if name in WRITTEN)
        raise InputError(f"--out {out}: {suffix} files are not written; expected one of {able}")
    return True


def export(source: Path, out: Path, like: Picture) -> None:
    """Write a restored picture under another name, in its format; what that cannot hold is said.

    Args:
        source: The restored picture, PNG or TIFF as `write_picture` makes it.
        out: Its suffix is the format.
        like: The picture that was restored.
    """
    from PIL import Image

    if out.suffix.lower() == source.suffix:
        os.replace(source, out)
        return
    picture = read_picture(source)
    form, lost = readable()[out.suffix.lower()], []
    values = picture.values[0].movedim(0, -1).numpy()
    array = np.rint(values.clip(0, 1) * 255).astype(np.uint8)
    array = array.repeat(3, -1) if picture.rgb and array.shape[-1] == 1 else array
    if picture.bits > 8:
        lost.append(f"{picture.bits} bits become 8")
    if picture.alpha is not None:
        if form in ("JPEG", "BMP"):
            lost.append("its transparency")
        else:
            top = {8: 255, 16: 65535, 32: 1}[picture.bits]
            alpha = np.rint(picture.alpha * (255 / top)).astype(np.uint8)
            array = np.concatenate([array, alpha[..., None]], -1)
    if form == "BMP" and (picture.profile or picture.kept.exif):
        lost.append("its colour profile and camera data")
    if lost:
        warnings.warn(f"{out}: a {form} file here does not hold {' and '.join(lost)}; PNG does")
    options: dict[str, object] = {}
    if picture.profile and form != "BMP":
        options["icc_profile"] = picture.profile
    if picture.kept.exif and form != "BMP":
        options["exif"] = b"Exif\0\0" + picture.kept.exif
    if picture.kept.dpi:
        options["dpi"] = picture.kept.dpi
    if form == "JPEG":
        options |= {"quality": max(QUALITY, like.jpeg_quality or 0), "subsampling": 0}
    if form == "WEBP":
        options |= {"lossless": True}
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(out, form, **options)
