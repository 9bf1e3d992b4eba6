"""Whatever holds numbers becomes a tensor, or is refused with the reason and the fix."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Refused(Exception):
    """A value that cannot be taken. The text, where there is one, says why and what to do instead."""


def as_tensor(value: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Return the numbers of a tensor, an array of any byte order and strides, a PIL picture, or nested lists.

    A tensor is returned as it is, another array as a copy. Pictures are (C, H, W) in [0, 1], grey ones (1, H, W).

    Args:
        value: What holds the numbers.
        dtype: Of the result; by default that of the array, float64 for floats of lists.

    Raises:
        Refused: No numbers, or some that have no plain meaning, such as masked ones.
    """
    if isinstance(value, Tensor):
        return _plain_tensor(value, dtype)
    if isinstance(value, (str, bytes, os.PathLike)):
        if _is_number(value):
            raise Refused("expected a number, without quotes")
        raise Refused(
            "expected its numbers: read the file first, such as numpy.asarray(PIL.Image.open(name)) / 255"
        )
    if type(value).__module__.startswith("PIL."):
        tensor = _picture(value)
        return tensor if dtype is None else tensor.to(dtype)
    tensor = torch.from_numpy(_native(_as_array(value)))
    return tensor if dtype is None else tensor.to(dtype)


def _is_number(text: str | bytes | os.PathLike[str]) -> bool:
    try:
        float(os.fsdecode(text))
    except ValueError:
        return False
    return True


def _plain_tensor(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    if value.layout != torch.strided or value.is_quantized or value.is_nested:
        raise Refused("expected a dense tensor, such as x.to_dense()")
    if value.device.type == "meta":
        raise Refused("expected numbers, and the device 'meta' holds none")
    return value if dtype is None else value.to(dtype)


def _as_array(value: Any) -> np.ndarray:
    """An array of whatever numpy can read, with the masked values counted."""
    if value is None or callable(value) or isinstance(value, (dict, set)):
        raise Refused("")
    try:
        array = np.ma.asarray(value) if isinstance(value, np.ma.MaskedArray) else np.asarray(value)
    except Exception as error:  # numpy, or whatever `__array__` of a foreign object raises
        text = " ".join(str(error).split())[:200]
        raise Refused(f"expected numbers; numpy cannot read it as an array ({text})") from error
    if isinstance(array, np.ma.MaskedArray):
        count = int(np.ma.getmaskarray(array).sum())
        if count:
            raise Refused(
                f"{count} of its values are masked, which is not obeyed here: pass array.filled(0), and leave them "
                "out of a measurement by Composition(operator, Inpainting(~array.mask[0]))"
            )
        array = array.data
    return array


def _native(array: np.ndarray) -> np.ndarray:
    """A writeable copy in a type and layout that torch has."""
    if array.dtype.kind not in "fiubc":
        raise Refused(f"expected numbers, not values of the type {array.dtype}")
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        return array.astype(np.float64)
    if array.dtype.kind == "c" and array.dtype.itemsize > 16:
        return array.astype(np.complex128)
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:  # torch has them, and no arithmetic
        return array.astype(np.float64 if array.dtype.itemsize == 8 else np.int64)
    return np.array(array, dtype=array.dtype.newbyteorder("="), order="C")


def _picture(image: Any) -> Tensor:
    """(C, H, W) in [0, 1], float32."""
    mode = getattr(image, "mode", None)
    if mode in ("1", "P", "PA"):
        image = image.convert("L" if mode == "1" else "RGB")
    elif mode not in ("L", "RGB", "F") and not str(mode).startswith("I;16"):
        raise Refused(
            f"expected a grey or RGB picture, and its mode is {mode!r}: pass image.convert('RGB') or convert('L')"
        )
    array = np.asarray(image)
    scale = {"u1": 255.0, "u2": 65535.0}.get(array.dtype.str[1:], 1.0)
    tensor = torch.from_numpy(array.astype(np.float32) / np.float32(scale))
    return tensor[None] if tensor.ndim == 2 else tensor.movedim(-1, 0).contiguous()
