"""Restoration tasks by name: the operator that made a picture what it is, from a few numbers or files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invguide.errors import InputError, ShapeError, suggest
from invguide.forward_operator import Operator
from invguide.images.picture_files import check_regular
from invguide.images.reading import Picture, read_picture
from invguide.operators import (
    HDR,
    Blur,
    GaussianBlur,
    Grayscale,
    Identity,
    Inpainting,
    MotionBlur,
    SuperResolution,
)
from invguide.restoration.jpeg_measurement import Measurement, measure_jpeg
from invguide.restoration.masks import read_mask


@dataclass(frozen=True)
class Options:
    """What a task may need; None where it was not given.

    Attributes:
        mask: Picture, white where pixels are known.
        invert_mask: The mask is black where pixels are known.
        kernel: Blur kernel, a picture, .npy or text file.
        blur_sigma: Standard deviation of a Gaussian blur, pixels.
        length, angle: Of a motion blur, pixels and degrees counter-clockwise from the right.
        factor, filter: Of a reduction in size.
        quality: Of a JPEG file, 1 to 100; by default the file tells.
        gain: Over-exposure, 2 is one stop.
    """

    mask: Path | None = None
    invert_mask: bool | None = None
    kernel: Path | None = None
    blur_sigma: float | None = None
    length: float | None = None
    angle: float | None = None
    factor: int | None = None
    filter: str | None = None
    quality: float | None = None
    gain: float | None = None

    @property
    def given(self) -> dict[str, Any]:
        return {
            f.name: v for f in fields(self) if (v := getattr(self, f.name)) not in (None, False)
        }


@dataclass(frozen=True)
class Task:
    """A name, the options that belong to it, and what a picture is a measurement of.

    Attributes:
        objects: Only a prior that knows objects can do it: nothing in the picture itself tells the answer.
        build: The operator whose output the picture is; it acts on grey and colour alike, save for "colorize".
        measure: In place of `build`, where the measurement is not the pixels: of options, picture, the prior's
            channels and the noise level given.
        solver_settings: By the name of a solver, what suits the task better than its defaults.
        sampler: What "auto" stands for where several samples are asked for, if not the usual one.
    """

    name: str
    summary: str
    options: tuple[str, ...]
    build: Callable[[Options, Picture], Operator] | None = None
    measure: Callable[[Options, Picture, int, float | None], Measurement] | None = None
    solver_settings: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    sampler: str | None = None
    objects: bool = False

    def operator(self, options: Options, picture: Picture) -> Operator:
        """Return the operator whose output the picture is.

        Raises:
            InputError: Options that are missing or wrong; a task whose measurement is not the pixels.
        """
        if self.build is None:
            raise InputError(f"the task {self.name} measures files, not pixels; use its `measure`")
        return self.build(options, picture)


def find_task(name: str, options: Options) -> Task:
    """Return the task of this name.

    Raises:
        InputError: Unknown (the nearest is suggested), or options that it does not use.
    """
    task = TASKS.get(name.lower().replace("_", "-"))
    if task is None:
        raise InputError(f"unknown task {name!r}; {suggest(name, TASKS)}")
    for option in options.given:
        if option not in task.options:
            takes = ", ".join(map(_flag, task.options)) or "no options"
            raise InputError(
                f"{_flag(option)} is not used by the task {task.name}, which takes {takes}"
            )
    return task


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")


# ---- operators of the tasks


def _blur(options: Options, picture: Picture) -> Operator:
    if options.kernel is None:
        return GaussianBlur(sigma=1.5 if options.blur_sigma is None else options.blur_sigma)
    if options.blur_sigma is not None:
        raise InputError("--kernel and --blur-sigma are both given; give one")
    return _kernel_blur(options.kernel, picture)


def _motion(options: Options, picture: Picture) -> Operator:
    if options.kernel is None:
        length = 9.0 if options.length is None else options.length
        return MotionBlur(length=length, angle=options.angle or 0.0)
    if options.length is not None or options.angle is not None:
        raise InputError(
            "--kernel is given together with --length or --angle; give one or the other"
        )
    return _kernel_blur(options.kernel, picture)


def _kernel_blur(path: Path, picture: Picture) -> Operator:
    kernel = read_kernel(path)
    blur = Blur(kernel)  # checks the kernel
    if kernel.shape[0] > picture.size[0] or kernel.shape[1] > picture.size[1]:
        raise ShapeError(
            f"kernel {path} is {kernel.shape[1]} x {kernel.shape[0]} pixels, larger than the picture "
            f"({picture.size[1]} x {picture.size[0]}); cut it to its middle"
        )
    return blur


def _inpaint(options: Options, picture: Picture) -> Operator:
    if options.mask is None:
        raise InputError(
            "the task inpaint needs --mask FILE: white where pixels are known, black where missing"
        )
    return Inpainting(read_mask(options.mask, picture.size, bool(options.invert_mask)))


def _reduce(options: Options, picture: Picture) -> Operator:
    factor = 4 if options.factor is None else options.factor
    return SuperResolution(factor=factor, filter=options.filter or "bicubic")  # pyright: ignore[reportArgumentType]


def _jpeg(options: Options, picture: Picture, colours: int, sigma_y: float | None) -> Measurement:
    return measure_jpeg(picture, options.quality, colours, sigma_y)


TASKS = {
    task.name: task
    for task in (
        Task("denoise", "remove noise", (), lambda o, p: Identity()),
        Task("deblur", "sharpen what a lens or --kernel blurred", ("blur_sigma", "kernel"), _blur),
        Task("motion-deblur", "undo camera shake", ("length", "angle", "kernel"), _motion),
        Task("inpaint", "fill in missing pixels", ("mask", "invert_mask"), _inpaint),
        Task("super-resolution", "enlarge", ("factor", "filter"), _reduce),
        Task(
            "colorize",
            "give a grey picture colours, with a prior that knows objects",
            (),
            lambda o, p: Grayscale(),
            objects=True,
        ),
        # `invguide bench jpeg`: 4 steps and a lam of 0.2 to 0.6 are within 0.15 dB.
        Task(
            "jpeg",
            "remove the blocks and rings of JPEG",
            ("quality",),
            measure=_jpeg,
            solver_settings={
                "HQS": {"num_steps": 6, "lam": 0.35, "sigma_start": 0.3, "sigma_end": 0.02},
                "DiffPIR": {"num_steps": 30, "lam": 0.35},
            },
            sampler="DiffPIR",  # it takes the same data step; samples of DPS are worse than their file
        ),
        Task(
            "hdr",
            "recover over-exposed highlights",
            ("gain",),
            lambda o, p: HDR(gain=o.gain or 2.0),
        ),
    )
}


# ---- files


def read_kernel(path: Path) -> Tensor:
    """Return the numbers of a .npy, .txt or .csv file, or the brightness of a picture, (H, W)."""
    if path.suffix.lower() not in (".npy", ".txt", ".csv"):
        return _luma(read_picture(path).values)[0, 0]
    return torch.from_numpy(np.asarray(read_array(path, "kernel"), dtype=np.float32))


def read_array(path: Path, what: str) -> np.ndarray:
    """Return the numbers of a .npy, .txt or .csv file; `what` it is, for the message.

    Raises:
        InputError: Missing or unreadable.
    """
    check_regular(path)
    try:
        if path.suffix.lower() == ".npy":
            return np.load(path, allow_pickle=False)
        return np.loadtxt(path, delimiter="," if path.suffix.lower() == ".csv" else None, ndmin=2)
    except FileNotFoundError:
        raise InputError(f"no such file: {path}") from None
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{what} {path} cannot be read: {error}") from error


def _luma(values: Tensor) -> Tensor:
    return values if values.shape[1] == 1 else Grayscale()(values)


def to_grey(values: Tensor) -> Tensor:
    """(..., 3, H, W) -> luma (..., 1, H, W)."""
    flat = values.reshape(-1, *values.shape[-3:])
    return _luma(flat).reshape(*values.shape[:-3], 1, *values.shape[-2:])
