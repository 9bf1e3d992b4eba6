"""Values that have no business where they are passed."""

from __future__ import annotations

import math
from datetime import date
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

ON_PURPOSE = "on purpose"


class _Words:
    def __repr__(self) -> str:
        return "an object"


def _raise(*_: Any) -> Any:
    raise ValueError(ON_PURPOSE)


def pool() -> dict[str, list[Any]]:
    """Values that somebody might pass by mistake, by kind, new ones each time."""
    rng = np.random.default_rng(0)
    image = rng.random((1, 3, 8, 8))
    numbers: list[Any] = [math.nan, math.inf, -math.inf, 0, -1, -3, 0.5, 1e-300, 1e9, 1e300]
    numbers += [10**12, -(10**12), 10**400, True, False, 2 + 1j, Decimal("0.5"), Fraction(1, 3)]
    numbers += [np.int64(3), np.float32(0.5), np.float64("nan"), np.bool_(True), np.array(2)]
    objects: list[Any] = [None, "", "2", "nonsense", "\0", b"bytes", _Words(), date(2020, 1, 1)]
    objects += [[], {}, (), set(), {"a": 1}, [None], ["a"], [1, [2, 3]], (math.nan,), (-1, 0)]
    objects += [(3, -8, 8), (3, 8), [3, 8, 8], (10**6, 10**6), range(3), slice(3), int, _Words]
    objects += [lambda: 0, lambda x: x, lambda x: "text", _raise, iter([1]), nn.Identity()]
    objects += [Path("none/there"), torch.device("meta"), torch.float16, torch.int64, "float32"]
    arrays: list[Any] = [np.zeros(0), np.zeros((2, 3)), image, image.astype(">f8"), image * np.nan]
    arrays += [image[..., ::-1], (255 * image).astype(np.uint8), image.astype(complex), image[0]]
    arrays += [np.ma.masked_greater(image, 0.5), np.array(["a", "b"]), np.array([{}, None])]
    arrays += [image.transpose(0, 2, 3, 1), image.astype(np.longdouble), image.astype("u2")]
    arrays += [
        np.array(["2020-01-01"], "M8[D]"),
        np.zeros(3, [("a", "f4")]),
        np.full((2, 2), np.inf),
    ]
    tensors: list[Any] = [torch.zeros(0), torch.zeros(3, 8, 8), torch.ones(1, 3, 8, 8).to_sparse()]
    tensors += [torch.tensor(0.1), torch.tensor([1, 2]), torch.ones(2, 3, dtype=torch.bool)]
    tensors += [torch.zeros(1, 3, 8, 8, device="meta"), torch.full((1, 3, 8, 8), math.nan)]
    tensors += [torch.ones(1, 3, 8, 8, dtype=torch.complex64), torch.ones(1, 1, 1, 1, 1, 1)]
    return {"number": numbers, "object": objects, "array": [*arrays, *tensors, _picture()]}


def _picture() -> Any:
    from PIL import Image

    return Image.new("RGB", (8, 8), (90, 120, 40))
