"""What the benches on photos share: the tasks, the noisy measurements, and figures kept per photo in a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invguide.api import load_prior
from invguide.diagnostics.metrics import calibration, crps, psnr, ssim
from invguide.engine.run_identity import fingerprint
from invguide.errors import InputError, suggest
from invguide.forward_operator import LinearOperator, Operator
from invguide.likelihood import Likelihood
from invguide.operators import HDR, GaussianBlur, Identity, Inpainting, MotionBlur, SuperResolution
from invguide.prior import Prior
from invguide.rng import Noise
from invguide.system.run_file import write_whole

# Name as printed -> operator for images of this shape.
TASKS: dict[str, Callable[[tuple[int, ...]], LinearOperator]] = {
    "deblur": lambda shape: GaussianBlur(sigma=1.5),
    "SR x2": lambda shape: SuperResolution(factor=2),
    "SR x4": lambda shape: SuperResolution(factor=4),
    "inpaint 70 %": lambda shape: Inpainting.random(shape, 0.7),
}
DENOISE = "denoise"  # has a bench of its own
HDR_GAIN = 2.0
OPERATORS: dict[str, Callable[[tuple[int, ...]], Operator]] = {
    **TASKS,
    DENOISE: lambda shape: Identity(),
    "motion deblur": lambda shape: MotionBlur(length=9, angle=30),
    "HDR": lambda shape: HDR(gain=HDR_GAIN),
}


def load_in(prior: str | Prior, precision: str) -> Prior:
    """Return a prior, or that of this name, with its network in "fp32", "bf16" or "fp16"."""
    loaded = load_prior(prior)
    return loaded if precision == loaded.precision else loaded.optimise(precision)


def check_tasks(tasks: Sequence[str]) -> None:
    """Raise InputError for a task that is not one of OPERATORS."""
    for task in tasks:
        if task not in OPERATORS:
            raise InputError(f"unknown task {task!r}; {suggest(task, OPERATORS)}")


@dataclass(frozen=True)
class Protocol:
    """Photos and noise; equal arguments give equal measurements.

    Attributes:
        data: An .npz file with uint8 photos `img_SIZE` (N, SIZE, SIZE, 3).
        size: Pixels per side.
        photos: The first so many of them.
        noise: Standard deviation in [0, 1].
        seed: Of the noise.
    """

    data: Path
    size: int = 128
    photos: int = 28
    noise: float = 0.025
    seed: int = 0

    @cached_property
    def truth(self) -> Tensor:
        """The clean photos in [0, 1], (photos, 3, size, size)."""
        try:
            with np.load(self.data) as file:
                images = file[f"img_{self.size}"]
        except (OSError, ValueError) as error:
            raise InputError(
                f"data file {self.data} cannot be read ({error}); expected an .npz file"
            ) from error
        except KeyError:
            raise InputError(
                f"data file {self.data} has no photos img_{self.size} of size {self.size}"
            ) from None
        if not 1 <= self.photos <= len(images):
            raise InputError(f"photos is {self.photos}; the data file has {len(images)}")
        chosen = torch.from_numpy(images[: self.photos])
        return chosen.permute(0, 3, 1, 2).float().contiguous() / 255

    def operator(self, task: str) -> Operator:
        return OPERATORS[task](tuple(self.truth.shape[1:]))

    def likelihood(self, task: str, photo: int) -> Likelihood:
        """The measurement of one photo."""
        operator = self.operator(task)
        clean = operator(self.truth[photo, None])
        noise = Noise(self.seed, ((photo, 0),), tuple(clean.shape[1:]))
        return Likelihood(operator, clean + self.noise * noise("measurement"), self.noise)

    def identity(self, task: str) -> dict[str, Any]:
        return {"task": task, "size": self.size, "noise": self.noise, "seed": self.seed}

    def score(self, task: str, photo: int, samples: Tensor) -> dict[str, Any]:
        """Figures of the samples (S, C, H, W) of one photo, ready for JSON."""
        truth, mean = self.truth[photo, None], samples.mean(0, keepdim=True)
        likelihood = self.likelihood(task, photo).rows(torch.zeros(len(samples), dtype=torch.long))
        figures: dict[str, Any] = {
            "psnr": psnr(samples, truth).tolist(),
            "ssim": ssim(samples, truth.expand_as(samples)).tolist(),
            "chi2": likelihood.chi2(samples).tolist(),
            "psnr_mean": float(psnr(mean, truth)),
            "ssim_mean": float(ssim(mean, truth)),
        }
        if len(samples) > 1:
            std = samples.std(0, keepdim=True)
            figures["error2"] = float((mean - truth).square().mean())
            figures["variance"] = float(std.square().mean())
            figures["crps"] = float(crps(samples[None], truth))
            figures["ratio"] = float(calibration(samples[None], truth))
            figures["coverage"] = float(((truth - mean).abs() <= 1.645 * std).float().mean())
        return figures


class Cells:
    """Figures per photo of one method on one task, kept in a JSON file where a folder is given.

    The file's name ends in a hash of everything that the figures depend on, photo by photo, so that a folder may hold
    several settings, and a larger number of photos goes on from a smaller one.
    """

    def __init__(self, folder: Path | None, name: str, identity: dict[str, Any]) -> None:
        self.identity = json.loads(json.dumps(identity, default=str))
        text = json.dumps(self.identity, sort_keys=True)
        slug = "".join(c if c.isalnum() else "-" for c in name).strip("-")
        mark = hashlib.sha256(text.encode()).hexdigest()[:10]
        self.path = None if folder is None else folder / f"{slug}-{mark}.json"
        self.cells: dict[str, dict[str, Any]] = {}
        if self.path is not None and self.path.exists():
            self.cells = json.loads(self.path.read_text("utf-8"))["photos"]

    @staticmethod
    def _key(truth: Tensor) -> str:
        return fingerprint(truth)

    def get(self, truth: Tensor) -> dict[str, Any] | None:
        return self.cells.get(self._key(truth))

    def put(self, truth: Tensor, figures: dict[str, Any]) -> None:
        self.cells[self._key(truth)] = figures
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"identity": self.identity, "photos": self.cells})
        write_whole(self.path, content.encode(), lasting=False)


def columns(figures: list[dict[str, Any]], name: str, first: bool = False) -> Iterator[float]:
    """Yield one number per photo: the figure, or of a list its mean (or its first entry)."""
    for cell in figures:
        value = cell[name]
        yield (
            (value[0] if first else sum(value) / len(value)) if isinstance(value, list) else value
        )


def average(figures: list[dict[str, Any]], name: str, first: bool = False) -> float:
    values = list(columns(figures, name, first))
    return sum(values) / len(values)
