"""Measurements made from clean pictures: the operator of a task, noise, and the rounding of a file."""

from __future__ import annotations

import dataclasses
import io
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from invguide.errors import InputError
from invguide.forward_operator import Operator
from invguide.images.reading import Picture, read_picture
from invguide.images.transparency import without_hidden_colours
from invguide.images.writing import write_picture
from invguide.operators import Identity, Inpainting
from invguide.restoration.manifest import check_writable
from invguide.restoration.tasks import Options, find_task

NOISE, QUALITY = 0.05, 20


def add_noise(y: Tensor, sigma_y: float, seed: int) -> Tensor:
    """y plus Gaussian noise, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return y + sigma_y * torch.randn(y.shape, generator=generator, dtype=y.dtype).to(y.device)


def degrade_picture(
    source: Path,
    task_name: str,
    options: Options,
    missing: float | None = None,
    sigma_y: float | None = None,
    seed: int = 0,
    out: Path | None = None,
) -> tuple[list[Path], str]:
    """Write what `restore` is to undo.

    Args:
        source: A clean picture.
        task_name, options: As for `restore`.
        missing: inpaint without a mask: the fraction of pixels to drop at random; None drops a box in the middle.
        sigma_y: Noise standard deviation, white = 1; 0.05 by default, 0 for jpeg.
        seed: Of the noise and the missing pixels.
        out: The file to write; its suffix becomes .png (.tiff for floating point).

    Returns:
        The files written, and the arguments of `invguide restore` that undo it.
    """
    picture = without_hidden_colours(read_picture(source))
    if task_name == "jpeg" and options.quality is None:
        options = dataclasses.replace(options, quality=QUALITY)
    task = find_task(task_name, options)
    sigma = (0.0 if task.name == "jpeg" else NOISE) if sigma_y is None else sigma_y
    if not (sigma >= 0 and math.isfinite(sigma)):
        raise InputError(f"sigma_y is {sigma:g}; expected a noise standard deviation >= 0")
    if missing is not None and (task.name != "inpaint" or options.mask is not None):
        raise InputError("--missing is for --task inpaint without --mask")
    if task.name == "colorize" and picture.grey:
        raise InputError(f"{source} is grey already; --task colorize needs a colour picture")
    out = Path(f"{source.stem}-degraded") if out is None else out
    out = out.with_suffix(picture.suffix)
    if out.exists() and out.resolve() == source.resolve():
        raise InputError(f"{out} is the input itself; use another --out")
    check_writable(out.parent)
    files, advice = [], [str(out), "--task", task.name]
    if task.name == "inpaint" and options.mask is None:
        operator: Operator = _holes(picture, missing, seed)
        mask = out.with_name(f"{out.stem}-mask.png")
        files.append(write_picture(mask, operator.mask.float()))  # pyright: ignore[reportArgumentType]
        advice += ["--mask", str(mask)]
    elif task.build is not None:
        operator = task.operator(options, picture)
    else:
        operator = Identity()
    y = _jpeg(picture.values, options.quality) if task.name == "jpeg" else operator(picture.values)
    y = add_noise(y, sigma, seed)
    if isinstance(operator, Inpainting):
        y = operator(y)
    files.insert(0, write_picture(out, y, picture))
    for name, value in options.given.items():
        advice += ["--" + name.replace("_", "-"), *([] if value is True else [str(value)])]
    if sigma:
        advice += ["--sigma-y", f"{sigma:g}"]
    return files, " ".join(advice)


def _holes(picture: Picture, missing: float | None, seed: int) -> Inpainting:
    if missing is None:
        return Inpainting.box(picture.values.shape[1:])
    return Inpainting.random(picture.values.shape[1:], missing, seed)


def _jpeg(values: Tensor, quality: float | None) -> Tensor:
    """What a real JPEG file keeps; the operator is its differentiable likeness."""
    from PIL import Image

    if quality is None or not 1 <= quality <= 100:
        raise InputError(f"--quality is {quality}; expected 1 to 100")
    array = (values[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(
        buffer, "JPEG", quality=round(quality)
    )
    decoded = np.asarray(Image.open(buffer))
    decoded = decoded[..., None] if decoded.ndim == 2 else decoded
    return torch.from_numpy(decoded.copy()).permute(2, 0, 1)[None].to(values) / 255
