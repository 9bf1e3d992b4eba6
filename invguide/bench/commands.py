"""What `restore` costs a user: the command itself, task by task, with its environment, and beside other work."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from invguide.bench.protocol import Protocol
from invguide.errors import InputError, RunError, suggest
from invguide.system.progress import progress_bar
from invguide.system.tables import Table
from invguide.system.threads import POLICY, THREADS

HERE = "here"


@dataclass(frozen=True)
class Case:
    """A task, what `degrade` needs to make its measurement, and what `restore` is told."""

    task: str
    options: Mapping[str, str] = field(default_factory=dict)
    degrade: Mapping[str, str] = field(default_factory=dict)
    restore: Mapping[str, str] = field(default_factory=dict)


NOISE = {"sigma-y": "0.02"}
CASES = {
    case.task: case
    for case in (
        Case("denoise", {"sigma-y": "0.1"}),
        Case("deblur", NOISE),
        Case("motion-deblur", {"length": "9", "angle": "30", **NOISE}),
        Case("inpaint", NOISE, {"missing": "0.5"}),
        Case("super-resolution", {"factor": "2", **NOISE}),
        Case("jpeg", {"quality": "20"}),
        Case("hdr", NOISE),
    )
}


@dataclass(frozen=True)
class Run:
    """What one command took per photo, and what came out."""

    cpu: float
    wall: float
    solving: float
    calls: float
    psnr: float


def tasks(
    data: Path,
    *,
    size: int = 128,
    photos: int = 3,
    tasks: Sequence[str] = tuple(CASES),
    busy: Sequence[int] = (0,),
    against: Path | None = None,
    progress: bool = True,
) -> Table:
    """Run `restore` on degraded photos, one folder a task, and time the whole command.

    The variables that set threads and their waiting are taken out of the environment, so that the command has the
    defaults of a user who knows nothing of them.

    Args:
        data: An .npz file with uint8 photos `img_SIZE` (N, SIZE, SIZE, 3).
        size: Pixels per side.
        photos: The first so many of them.
        tasks: Names of CASES.
        busy: Numbers of other processes that keep a core busy meanwhile; one row each.
        against: Folder of another checkout of this package, whose command runs in turns with this one's.
        progress: Show a bar.

    Returns:
        Network calls, CPU and wall seconds and PSNR per photo, and their sums over the tasks.

    Raises:
        InputError: An unknown task, no checkout in the folder.
        RunError: A command failed.
    """
    for name in tasks:
        if name not in CASES:
            raise InputError(f"unknown task {name!r}; {suggest(name, CASES)}")
    trees = {HERE: Path(__file__).resolve().parents[2]}
    if against is not None:
        if not (against / "invguide" / "__main__.py").exists():
            raise InputError(f"{against} is no checkout of invguide; expected invguide/ in it")
        trees = {"against": against.resolve(), **trees}
    clean = (255 * Protocol(data, size, photos).truth).round().byte().permute(0, 2, 3, 1).numpy()
    found: dict[tuple[str, int, str], Run] = {}
    before: dict[str, float] = {}
    bar = progress_bar(len(tasks) * len(busy) * len(trees), "tasks", progress)
    with tempfile.TemporaryDirectory() as scratch, bar as shown:
        for name in tasks:
            pictures = Path(scratch) / name
            arguments, before[name] = _degrade(CASES[name], clean, pictures)
            for others in busy:
                with _company(others):
                    for tree, where in trees.items():
                        out = Path(scratch) / f"{name}-{others}-{tree}"
                        found[name, others, tree] = _restore(
                            where, pictures, out, arguments, clean
                        )
                        shown.update(1)
    return _table(found, before, list(trees), size, len(clean))


def _environment(tree: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in (*POLICY, *THREADS)}
    return {**kept, "PYTHONPATH": str(tree)}


def _command(tree: Path, arguments: Sequence[str]) -> None:
    """Run a command of the package in this tree; its own lines are shown only where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "invguide", *arguments],
        cwd=tree,
        env=_environment(tree),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RunError(
            f"`invguide {' '.join(arguments)}` in {tree} ended with {done.returncode}: {done.stderr[-500:]}"
        )


def _degrade(case: Case, clean: np.ndarray, folder: Path) -> tuple[list[str], float]:
    """Write measurements of the photos; return the arguments of `restore` for them, and their own PSNR."""
    from invguide.restoration.degradation import degrade_picture
    from invguide.restoration.tasks import Options

    folder.mkdir()
    given: dict[str, Any] = {k: v for k, v in case.options.items() if k != "sigma-y"}
    numbers: dict[str, Any] = {k: int(v) if k == "factor" else float(v) for k, v in given.items()}
    sigma = case.options.get("sigma-y")
    arguments = ["--task", case.task]
    for name, value in case.options.items():
        arguments += [f"--{name}", value]
    missing = case.degrade.get("missing")
    options = Options(**numbers)
    if missing is not None:  # one mask for all
        mask = folder.parent / f"{case.task}-mask.png"
        holes = np.random.default_rng(0).random(clean.shape[1:3]) < float(missing)
        Image.fromarray(np.where(holes, 0, 255).astype(np.uint8)).save(mask)
        options = Options(mask=mask)
        arguments += ["--mask", str(mask)]
    errors = []
    for i, photo in enumerate(clean):
        source = folder.parent / "clean.png"
        Image.fromarray(photo).save(source)
        out = folder / f"{i:03d}.png"
        degrade_picture(
            source,
            case.task,
            options,
            sigma_y=None if sigma is None else float(sigma),
            seed=i,
            out=out,
        )
        errors.append(_psnr(out, photo))
    return arguments, float(np.mean(errors))


def _restore(
    tree: Path, pictures: Path, out: Path, arguments: Sequence[str], clean: np.ndarray
) -> Run:
    from invguide.restoration.manifest import MANIFEST

    spent, start = _children(), time.perf_counter()
    _command(tree, ["restore", str(pictures), *arguments, "--out", str(out), "--quiet"])
    cpu, wall = _children() - spent, time.perf_counter() - start
    calls, solving, quality = [], [], []
    for i, photo in enumerate(clean):
        manifest = json.loads((out / f"{i:03d}" / MANIFEST).read_text("utf-8"))
        calls.append(manifest["nfe"])
        solving.append(manifest["seconds"])
        quality.append(_psnr(out / f"{i:03d}" / "restored.png", photo))
    count = len(clean)
    means = (float(np.mean(figures)) for figures in (solving, calls, quality))
    return Run(cpu / count, wall / count, *means)


def _children() -> float:
    times = os.times()
    return times.children_user + times.children_system


def _psnr(path: Path, photo: np.ndarray) -> float:
    """Of a picture file against a photo (H, W, 3) of bytes, dB; not a number where sizes differ."""
    picture = np.asarray(Image.open(path).convert("RGB"), float)
    if picture.shape != photo.shape:
        return math.nan
    return -10 * math.log10(max(float(np.mean((picture / 255 - photo / 255.0) ** 2)), 1e-12))


@contextmanager
def _company(count: int) -> Iterator[None]:
    """So many processes that keep a core busy each."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def _table(
    found: Mapping[tuple[str, int, str], Run],
    before: Mapping[str, float],
    trees: list[str],
    size: int,
    photos: int,
) -> Table:
    rows, figures = [], []
    for (name, others, tree), run in found.items():
        figures.append({"task": name, "busy": others, "tree": tree, **vars(run)})
        cells = (f"{run.calls:.0f}", f"{run.cpu:.2f}", f"{run.wall:.2f}", f"{run.solving:.2f}")
        quality = ("" if math.isnan(before[name]) else f"{before[name]:.2f}", f"{run.psnr:.2f}")
        rows.append((name, str(others), tree, *cells, *quality))
    for others in dict.fromkeys(others for _, others, _ in found):
        for tree in trees:
            runs = [r for (_, o, t), r in found.items() if (o, t) == (others, tree)]
            sums = [sum(getattr(r, k) for r in runs) for k in ("calls", "cpu", "wall", "solving")]
            cells = (f"{sums[0]:.0f}", *(f"{s:.2f}" for s in sums[1:]))
            rows.append(("sum", str(others), tree, *cells, "", ""))
    note = (
        f"`restore` of a folder of {photos} photos of {size} x {size} a task, per photo. CPU and wall seconds are "
        "those of the whole command, start included; solving is its own clock, wall seconds without start and files."
    )
    head = ("task", "busy", "tree", "calls", "CPU, s", "wall, s", "solving, s", "dB in", "dB out")
    return Table(head, tuple(rows), (note,), {"runs": figures})
