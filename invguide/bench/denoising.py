"""The table of denoising: one call of the prior against CBM3D and total variation, noise of known level on photos."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from invguide.api import choose_solver, make_solver
from invguide.bench.protocol import DENOISE, Cells, Protocol, average, columns, load_in
from invguide.bench.restoration import (
    TV,
    Figures,
    best_tv,
    count_worse,
    degraded,
    run_solver,
)
from invguide.errors import InputError
from invguide.numerics.symmetry import SYMMETRIES
from invguide.prior import Prior
from invguide.problem.problem import Problem
from invguide.solver import Solver
from invguide.solvers import PosteriorMean
from invguide.system.progress import progress_bar
from invguide.system.tables import Table

LEVELS = (15.0, 25.0, 50.0)
NOISY, CBM3D = "noisy", "CBM3D"
Methods = dict[str, list[Figures]]  # by name, of each level


def denoise(
    data: str | Path,
    *,
    size: int = 128,
    photos: int = 28,
    levels: Sequence[float] = LEVELS,
    prior: str | Prior = "natural",
    precision: str = "fp32",
    solvers: Sequence[str | Solver[Any]] = (),
    tv: bool = True,
    out: str | Path | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: bool = True,
) -> Table:
    """Remove white Gaussian noise, not clipped, whose level every method is told.

    Args:
        data: An .npz file with uint8 photos `img_SIZE` (N, SIZE, SIZE, 3).
        size, photos: Which photos, and how many.
        levels: Standard deviations of the noise, white = 255.
        prior: A prior or its name.
        precision: Of its network: "fp32", "bf16" or "fp16".
        solvers: Further rows: solvers or their names.
        tv: A row of total variation, with the weight that is best on these very photos.
        out: Folder that keeps the figures of each photo; a second call goes on from there.
        seed: Of the noise.
        device: As for `invguide.solve`.
        progress: Show a bar.

    Returns:
        For each level the mean PSNR over photos; over all levels the gain over the noisy photo where it is least, how
        many photos came out worse than they went in, CPU seconds and network calls per photo. CBM3D (Dabov et al.
        2007, "Color image denoising via sparse 3D collaborative filtering", package `bm3d`) where it is installed.

    Raises:
        InputError: A level that is no noise, an unknown solver, no such photos.
    """
    if not levels or any(not 0 < level <= 255 for level in levels):
        raise InputError(f"levels are {list(levels)}; expected numbers above 0, up to 255 (white)")
    folder = None if out is None else Path(out)
    protocols = [Protocol(Path(data), size, photos, level / 255, seed) for level in levels]
    loaded = load_in(prior, precision)

    def run(solver: Solver[Any]) -> list[Figures]:
        return [
            run_solver(p, DENOISE, solver, loaded, 1, folder, device, progress) for p in protocols
        ]

    methods: Methods = {NOISY: [degraded(p, DENOISE) for p in protocols]}
    problem = Problem(loaded, protocols[0].likelihood(DENOISE, 0))
    chosen = choose_solver(problem, 1)
    automatic = f"auto: {type(chosen).__name__}"
    methods[automatic] = run(chosen)
    if isinstance(chosen, PosteriorMean) and loaded.symmetric:
        methods["of eight views"] = run(PosteriorMean(num_steps=SYMMETRIES))
    for entry in solvers:
        solver = make_solver(entry)
        methods[type(solver).__name__] = run(solver)
    if find_spec("bm3d") is not None:
        methods[CBM3D] = [_cbm3d(p, folder, progress) for p in protocols]
    if tv:
        methods[TV] = [best_tv(p, DENOISE, folder, progress) for p in protocols]
    rows = [_row(name, cells, methods[NOISY]) for name, cells in methods.items()]
    if CBM3D in methods:
        rows.append(_against(methods[automatic], methods[CBM3D]))
    head = ("method", *(f"{level:g} / 255" for level in levels))
    name = prior if isinstance(prior, str) else type(prior).__name__
    return Table(
        (*head, "least gain", "worse", "CPU s", "calls"),
        tuple(rows),
        _notes(protocols[0], f"{name} in {precision}", methods),
        per_level(methods, levels, "psnr"),
    )


def _cbm3d(protocol: Protocol, folder: Path | None, progress: bool) -> Figures:
    """Of the package `bm3d`, with its default profile, told the level."""
    package = import_module("bm3d")
    identity = {"method": CBM3D, "bm3d": metadata.version("bm3d"), **protocol.identity(DENOISE)}
    cells, figures = Cells(folder, f"{CBM3D} {DENOISE}", identity), []
    with progress_bar(protocol.photos, f"{CBM3D}, {255 * protocol.noise:g}", progress) as bar:
        for photo in range(protocol.photos):
            cell = cells.get(protocol.truth[photo])
            if cell is None:
                y = protocol.likelihood(DENOISE, photo).y
                pixels = y[0].permute(1, 2, 0).double().numpy()
                start, wall = time.process_time(), time.monotonic()
                restored = package.bm3d_rgb(pixels, protocol.noise)
                spent = {
                    "cpu": time.process_time() - start,
                    "seconds": time.monotonic() - wall,
                    "nfe": 0,
                }
                x = torch.from_numpy(restored).permute(2, 0, 1)[None].to(y)
                cell = {**protocol.score(DENOISE, photo, x), **spent}
                cells.put(protocol.truth[photo], cell)
            figures.append(cell)
            bar.update(1)
    return figures


# ---- print


def _row(name: str, cells: list[Figures], noisy: list[Figures]) -> tuple[str, ...]:
    quality = tuple(f"{average(figures, 'psnr'):.2f}" for figures in cells)
    if name == NOISY:
        return (name, *quality, "", "", "", "")
    worse = sum(count_worse(figures, n) for figures, n in zip(cells, noisy, strict=True))
    return (
        name,
        *quality,
        f"{_least_gain(cells, noisy):+.2f}",
        str(worse),
        f"{_mean(cells, 'cpu'):.2f}",
        f"{_mean(cells, 'nfe'):.0f}",
    )


def _least_gain(cells: list[Figures], noisy: list[Figures]) -> float:
    """Over all photos and levels, dB."""
    return min(
        answer - photo
        for figures, before in zip(cells, noisy, strict=True)
        for answer, photo in zip(columns(figures, "psnr"), columns(before, "psnr"), strict=True)
    )


def _mean(cells: list[Figures], name: str) -> float:
    return sum(average(figures, name) for figures in cells) / len(cells)


def _against(one: list[Figures], other: list[Figures]) -> tuple[str, ...]:
    gains = (average(a, "psnr") - average(b, "psnr") for a, b in zip(one, other, strict=True))
    times = _mean(other, "cpu") / max(_mean(one, "cpu"), 1e-9)
    return ("auto over CBM3D", *(f"{gain:+.2f}" for gain in gains), "", "", f"1 / {times:.0f}", "")


def _notes(protocol: Protocol, prior: str, methods: Methods) -> tuple[str, ...]:
    note = (
        f"Mean PSNR in dB over {protocol.photos} photos of {protocol.size} pixels with white Gaussian noise, answers "
        f"cut off to [0, 1], prior {prior}. Every method is told the level. Least gain: over the noisy photo, where it "
        "is least of all photos and levels. Worse: answers of less PSNR than the noisy photo. CPU seconds and network "
        "calls per photo."
    )
    if TV in methods:
        note += " TV: its weight is the best on these very photos."
    if CBM3D in methods:
        return (note,)
    return note, "CBM3D is left out, since `bm3d` is not installed: pip install bm3d"


def per_level(methods: Methods, levels: Sequence[float], quality: str) -> dict[str, Any]:
    """Figures per photo of each method at each level, for `Table.figures`; `quality` names the PSNR that counts."""
    names = (quality, "cpu", "nfe")
    return {
        method: {
            f"{level:g}": {n: list(columns(figures, n)) for n in names if n in figures[0]}
            for level, figures in zip(levels, cells, strict=True)
        }
        for method, cells in methods.items()
    }
