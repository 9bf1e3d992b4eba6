"""Forward operators, one per file."""

if __name__ != "invguide.operators":
    raise ImportError("import this package as 'invguide.operators'")

from .blur import Blur
from .composition import Composition
from .gaussian_blur import GaussianBlur
from .grayscale import Grayscale
from .hdr import HDR
from .identity import Identity
from .inpainting import Inpainting
from .jpeg import JPEG
from .jpeg_coefficients import JPEGCoefficients
from .motion_blur import MotionBlur
from .nonlinear_blur import NonlinearBlur
from .super_resolution import SuperResolution

__all__ = [
    "HDR",
    "JPEG",
    "Blur",
    "Composition",
    "GaussianBlur",
    "Grayscale",
    "Identity",
    "Inpainting",
    "JPEGCoefficients",
    "MotionBlur",
    "NonlinearBlur",
    "SuperResolution",
]
