"""Colour profiles: one that fits the pixels is passed on, other colour spaces are converted, the rest is dropped."""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

SPACES = {1: "GRAY", 3: "RGB"}  # as profiles call them, by the number of channels without alpha
FOREIGN = ("CMYK", "LAB")  # modes of PIL that are neither grey nor RGB
_DATE = struct.pack(">6H", 2000, 1, 1, 0, 0, 0)


def colour_space(profile: bytes) -> str | None:
    """Return "RGB", "GRAY", "CMYK", ... of a profile; None where LittleCMS cannot read it."""
    opened = _open(profile)
    return None if opened is None else str(opened.profile.xcolor_space).strip()


def fits(profile: bytes | None, channels: int) -> bool:
    """Return whether a profile describes pictures of 1 or 3 channels."""
    return profile is not None and colour_space(profile) == SPACES[channels]


def checked(profile: bytes | None, channels: int, path: Path) -> bytes | None:
    """Return the profile where it fits a picture of so many channels; else say that it is dropped, and return None."""
    if profile is None or fits(profile, channels):
        return profile
    space = colour_space(profile)
    what = "cannot be read" if space is None else f"is one for {space}"
    warnings.warn(
        f"{path}: its colour profile {what}, and the picture is {SPACES[channels]}; it is dropped"
    )
    return None


def to_srgb(image: Image, profile: bytes | None, path: Path) -> tuple[Image, bytes]:
    """Return a CMYK or Lab picture in sRGB, and the profile that says so.

    By its own profile where that can be used, else by PIL's plain formula.
    """
    from PIL import ImageCms

    target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    srgb = target.tobytes()
    srgb = srgb[:24] + _DATE + srgb[36:]  # LittleCMS puts the time of day there
    source = None if profile is None else _open(profile)
    if image.mode == "LAB":
        source = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    if source is not None:
        try:
            converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
            assert converted is not None  # only in place
            return converted, srgb
        except (ImageCms.PyCMSError, ValueError):
            pass
    if profile is not None:
        warnings.warn(
            f"{path}: its colour profile does not fit {image.mode} pixels; it is dropped, and colours may be off"
        )
    return image.convert("RGB"), srgb


def _open(profile: bytes) -> Any:
    from PIL import ImageCms

    try:
        return ImageCms.ImageCmsProfile(io.BytesIO(profile))
    except (OSError, ImageCms.PyCMSError):
        return None
