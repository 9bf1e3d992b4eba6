"""The table of photon-limited pictures: photos that fade into a black background, counted photon by photon."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invguide.api import choose_solver, make_solver
from invguide.bench.denoising import per_level
from invguide.bench.protocol import DENOISE, Cells, Protocol, average, columns, load_in
from invguide.bench.restoration import Figures, degraded, run_solver
from invguide.errors import InputError
from invguide.likelihood import Likelihood
from invguide.noise import Poisson
from invguide.prior import Prior
from invguide.problem.problem import Problem
from invguide.solver import Solver
from invguide.system.progress import progress_bar
from invguide.system.tables import Table

BRIGHT = 0.45  # mean of the bright part, white = 1
COUNTED, CBM3D = "y", "Anscombe, CBM3D"


@dataclass(frozen=True)
class Photons(Protocol):
    """A disc of each photo, its edge faded, on a black background: y = gain * Poisson(x / gain).

    Attributes:
        counts: Mean number of photons in the pixels of the disc.
    """

    counts: float = 5.0

    @cached_property
    def truth(self) -> Tensor:
        """Clean photos in [0, 1], their discs of mean 0.45 before that cuts off, (photos, 3, size, size)."""
        photos = super().truth
        t = torch.linspace(-1, 1, self.size)
        disc = ((0.75 - (t[:, None] ** 2 + t**2).sqrt()) / 0.1).clamp(0, 1)
        x = disc * photos
        return (x * (BRIGHT / x[..., disc > 0.5].mean((1, 2))[:, None, None, None])).clamp(0, 1)

    @property
    def gain(self) -> float:
        return BRIGHT / self.counts

    def likelihood(self, task: str, photo: int) -> Likelihood:
        operator = self.operator(task)
        rate = operator(self.truth[photo, None]).clamp_min(0) / self.gain
        source = np.random.Generator(np.random.Philox(key=[self.seed, photo]))
        count = torch.from_numpy(source.poisson(rate.double().numpy()))
        return Likelihood(operator, (self.gain * count).to(rate), Poisson(self.gain))

    def identity(self, task: str) -> dict[str, Any]:
        return {**super().identity(task), "counts": self.counts}


def photons(
    data: str | Path,
    *,
    size: int = 128,
    photos: int = 28,
    counts: Sequence[float] = (5.0, 20.0),
    prior: str | Prior = "natural",
    precision: str = "fp32",
    solvers: Sequence[str | Solver[Any]] = ("HQS",),
    samples: int = 4,
    out: str | Path | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: bool = True,
) -> Table:
    """Denoise photos of few photons on a black background.

    Args:
        data: An .npz file with uint8 photos `img_SIZE` (N, SIZE, SIZE, 3).
        size, photos: Which photos, and how many.
        counts: Mean numbers of photons in the bright part of a photo.
        prior: A prior or its name.
        precision: Of its network: "fp32", "bf16" or "fp16".
        solvers: Further rows: solvers or their names.
        samples: Per photo of solvers that draw samples; their mean counts.
        out: Folder that keeps the figures of each photo; a second call goes on from there.
        seed: Of the photons.
        device: As for `invguide.solve`.
        progress: Show a bar.

    Returns:
        For each number of photons the mean PSNR over photos; CBM3D after the Anscombe transform, with its exact
        unbiased inverse, where the package `bm3d` is installed.

    Raises:
        InputError: Counts that are none, an unknown solver, no such photos.
    """
    if not counts or any(not 0 < mean < float("inf") for mean in counts):
        raise InputError(f"counts are {list(counts)}; expected mean numbers of photons above 0")
    folder = None if out is None else Path(out)
    protocols = [Photons(Path(data), size, photos, seed=seed, counts=mean) for mean in counts]
    loaded = load_in(prior, precision)
    methods: dict[str, list[Figures]] = {COUNTED: [degraded(p, DENOISE) for p in protocols]}
    if find_spec("bm3d") is not None:
        methods[CBM3D] = [_cbm3d(p, folder, progress) for p in protocols]
    chosen = choose_solver(Problem(loaded, protocols[0].likelihood(DENOISE, 0)), 1)
    for name, solver in (
        (f"auto: {type(chosen).__name__}", chosen),
        *((type(s).__name__, s) for s in map(make_solver, solvers)),
    ):
        drawn = 1 if solver.point_estimate else samples
        methods[name if drawn == 1 else f"{name}, mean of {drawn}"] = [
            run_solver(p, DENOISE, solver, loaded, drawn, folder, device, progress)
            for p in protocols
        ]
    rows = tuple(_row(name, cells, methods[COUNTED]) for name, cells in methods.items())
    head = ("method", *(f"{mean:g} photons" for mean in counts), "worse", "chi2", "CPU s", "calls")
    prior_name = prior if isinstance(prior, str) else type(prior).__name__
    note = (
        f"Mean PSNR in dB over {photos} photos of {size} pixels, discs on black of these mean numbers of photons, told "
        f"to every method; prior {prior_name} in {precision}. Worse: answers of less PSNR than y. CPU seconds and "
        "network calls per photo."
    )
    if CBM3D not in methods:
        note += " CBM3D is left out, since `bm3d` is not installed: pip install bm3d"
    return Table(head, rows, (note,), per_level(methods, counts, "psnr_mean"))


def _cbm3d(protocol: Photons, folder: Path | None, progress: bool) -> Figures:
    """Counts made even, stretched to [0, 1], CBM3D told their level, and back."""
    package, law = import_module("bm3d"), Poisson(protocol.gain)
    identity = {"method": CBM3D, "bm3d": metadata.version("bm3d"), **protocol.identity(DENOISE)}
    cells, figures = Cells(folder, f"{CBM3D} {DENOISE}", identity), []
    dark, bright = (law.stabilise(torch.tensor(v, dtype=torch.float64)) for v in (0.0, 1.0))
    with progress_bar(protocol.photos, f"{CBM3D}, {protocol.counts:g}", progress) as bar:
        for photo in range(protocol.photos):
            cell = cells.get(protocol.truth[photo])
            if cell is None:
                y = protocol.likelihood(DENOISE, photo).y
                start, wall = time.process_time(), time.monotonic()
                even = (law.stabilise(y.double()) - dark) / (bright - dark)
                pixels = even[0].permute(1, 2, 0).numpy()
                z = torch.from_numpy(package.bm3d_rgb(pixels, float(1 / (bright - dark))))
                x = law.unstabilise(z.permute(2, 0, 1)[None] * (bright - dark) + dark).to(y)
                spent = {
                    "cpu": time.process_time() - start,
                    "seconds": time.monotonic() - wall,
                    "nfe": 0,
                }
                cell = {**protocol.score(DENOISE, photo, x), **spent}
                cells.put(protocol.truth[photo], cell)
            figures.append(cell)
            bar.update(1)
    return figures


# ---- print


def _row(name: str, cells: list[Figures], counted: list[Figures]) -> tuple[str, ...]:
    quality = tuple(f"{average(figures, 'psnr_mean'):.2f}" for figures in cells)
    if name == COUNTED:
        return (name, *quality, "", "", "", "")
    worse = sum(
        not answer >= before
        for figures, n in zip(cells, counted, strict=True)
        for answer, before in zip(
            columns(figures, "psnr_mean"), columns(n, "psnr_mean"), strict=True
        )
    )
    mean = {
        key: sum(average(f, key) for f in cells) / len(cells) for key in ("chi2", "cpu", "nfe")
    }
    return (
        name,
        *quality,
        str(worse),
        f"{mean['chi2']:.2f}",
        f"{mean['cpu']:.2f}",
        f"{mean['nfe']:.0f}",
    )
