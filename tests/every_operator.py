"""What several test files share: every public operator, with the settings that change what it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from invguide.forward_operator import Operator
from invguide.operators import (
    HDR,
    JPEG,
    Blur,
    Composition,
    GaussianBlur,
    Grayscale,
    Identity,
    Inpainting,
    JPEGCoefficients,
    MotionBlur,
    NonlinearBlur,
    SuperResolution,
)

SHAPE = (3, 13, 18)  # neither square nor a multiple of 2, 3 or 4 in both axes
PADDINGS = ("circular", "reflect", "valid")


def kernel(height: int = 3, width: int = 5) -> Tensor:
    weights = torch.rand(height, width, generator=torch.Generator().manual_seed(1)).double()
    return weights / weights.sum()


def disk() -> Tensor:
    weights = (torch.arange(-2, 3)[:, None] ** 2 + torch.arange(-3, 4) ** 2 <= 6).double()
    return weights / weights.sum()


LINEAR: dict[str, Any] = {
    "identity": Identity(),
    "grayscale": Grayscale(),
    "inpainting-random": Inpainting.random(SHAPE, 0.4, seed=3),
    "inpainting-box": Inpainting.box(SHAPE),
    **{f"gaussian-{p}": GaussianBlur(0.8, p) for p in PADDINGS},
    **{f"blur-{p}": Blur(kernel(), p) for p in PADDINGS},
    **{f"disk-{p}": Blur(disk(), p) for p in PADDINGS},
    **{f"motion-{p}": MotionBlur(4.5, 30, p) for p in PADDINGS},
    **{
        f"sr-{f}-{k}": SuperResolution(f, k)
        for f in (2, 3, 4)
        for k in ("bicubic", "box", "gaussian")
    },
    "jpeg-coefficients": JPEGCoefficients(SHAPE[1:]),
    "jpeg-420-turned": JPEGCoefficients(SHAPE[1:], "ycbcr", ((1, 1), (2, 2), (2, 2)), 6),
    "jpeg-luma": JPEGCoefficients(SHAPE[1:], "luma", orientation=3),
    "composition": Composition(GaussianBlur(0.8), SuperResolution(2), Grayscale()),
}
NONLINEAR: dict[str, Operator] = {
    "jpeg": JPEG(30),
    "hdr": HDR(),
    "hdr-gamma": HDR(2, gamma=1 / 2.2, pivot=0.5),
    "nonlinear-blur": NonlinearBlur(kernel()),
    "composition-nonlinear": Composition(GaussianBlur(1), JPEG(50), HDR()),
}
EVERY = {**LINEAR, **NONLINEAR}
