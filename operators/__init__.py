"""Forward operators, one per file."""

if __name__ != "invguide.operators":
    raise ImportError("import this package as 'invguide.operators'")

from .gaussian_blur import GaussianBlur
from .grayscale import Grayscale
from .identity import Identity
from .inpainting import Inpainting
from .super_resolution import SuperResolution

__all__ = [
    "GaussianBlur",
    "Grayscale",
    "Identity",
    "Inpainting",
    "SuperResolution",
]
