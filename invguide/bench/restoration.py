"""The table of restorations: solvers against total variation with its best weight, on photos."""

from __future__ import annotations

import hashlib
import inspect
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F

from invguide import driver
from invguide.api import choose_solver, make_solver
from invguide.bench.protocol import (
    HDR_GAIN,
    TASKS,
    Cells,
    Protocol,
    average,
    check_tasks,
    columns,
    load_in,
)
from invguide.bench.tv import restore_tv
from invguide.engine.run_identity import describe_prior
from invguide.errors import InputError
from invguide.forward_operator import LinearOperator
from invguide.prior import Prior
from invguide.problem.problem import Problem
from invguide.solver import Solver
from invguide.system.progress import progress_bar
from invguide.system.tables import Table

DEGRADED, TV = "degraded", "TV, best weight"
SOLVERS = ("auto", "DPS", "DiffPIR=1", "REDDiff=1", "HQS=1")
Figures = list[dict[str, Any]]  # one per photo


def restore(
    data: str | Path,
    *,
    size: int = 128,
    photos: int = 28,
    noise: float = 0.025,
    prior: str | Prior = "natural",
    precision: str = "fp32",
    solvers: Sequence[str | Solver[Any]] = SOLVERS,
    tasks: Sequence[str] = tuple(TASKS),
    samples: int = 8,
    tv: bool = True,
    out: str | Path | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: bool = True,
) -> Table:
    """Restore photos with every solver, and with total variation whose weight is the best on these very photos.

    Args:
        data: An .npz file with uint8 photos `img_SIZE` (N, SIZE, SIZE, 3).
        size, photos, noise: Which photos, how many, and the standard deviation of the noise in [0, 1].
        prior: A prior or its name.
        precision: Of the prior's network: "fp32", "bf16" or "fp16".
        solvers: Solvers or their names; "NAME=K" draws K samples. "auto" is what `solve` would choose, one sample.
        tasks: Some of "deblur", "SR x2", "SR x4", "inpaint 70 %"; where they are asked for, "denoise", "motion deblur"
            and "HDR" (twice the light, clipped).
        samples: Draws per photo of a solver without "=K".
        tv: Search the best weight of total variation, which takes longer than some solvers; for linear tasks.
        out: Folder that keeps the figures of each photo; a second call goes on from there.
        seed: Of noise and samples.
        device: As for `invguide.solve`.
        progress: Show a bar.

    Returns:
        Mean over photos of PSNR (SSIM) for each task, chi2 of the samples, network calls and seconds per photo, and
        how many photos have an answer of less PSNR than the degraded photo.
    """
    protocol = Protocol(Path(data), size, photos, noise, seed)
    folder = None if out is None else Path(out)
    check_tasks(tasks)
    methods: dict[str, dict[str, Figures]] = {DEGRADED: {t: degraded(protocol, t) for t in tasks}}
    tv = tv and all(isinstance(protocol.operator(t), LinearOperator) for t in tasks)
    if tv:
        methods[TV] = {t: best_tv(protocol, t, folder, progress) for t in tasks}
    loaded = load_in(prior, precision) if solvers else None
    entries = [_parse(entry, samples) for entry in solvers]
    automatic = ""
    for entry, count in entries:
        assert loaded is not None
        chosen = {t: resolve(entry, protocol, t, loaded) for t in tasks}
        names = dict.fromkeys(type(s).__name__ for s in chosen.values())
        name = " / ".join(names)
        if entry == "auto":
            name = automatic = f"auto: {name}"
        cells = {
            t: run_solver(protocol, t, chosen[t], loaded, count, folder, device, progress)
            for t in tasks
        }
        methods[name] = cells
        if count > 1:
            methods[f"{name}, mean of {count}"] = {
                t: _as_mean(figures) for t, figures in cells.items()
            }
    head = ("method", *tasks, "worse", "chi2", "network calls", "s per photo")
    rows = [_row(name, cells, methods[DEGRADED]) for name, cells in methods.items()]
    if automatic and tv:
        rows.append(_gain(methods[automatic], methods[TV], len(head)))
    name = prior if isinstance(prior, str) else type(prior).__name__
    notes = _notes(protocol, f"{name} in {precision}", methods)
    return Table(head, tuple(rows), notes, _figures(methods))


def _parse(entry: str | Solver[Any], samples: int) -> tuple[str | Solver[Any], int]:
    if not isinstance(entry, str):
        return entry, samples
    name, _, count = entry.partition("=")
    if count and not (count.isdigit() and int(count) > 0):
        raise InputError(f"solver {entry!r}: expected NAME or NAME=K with K samples per photo")
    return name, int(count) if count else 1 if name == "auto" else samples


def resolve(entry: str | Solver[Any], protocol: Protocol, task: str, prior: Prior) -> Solver[Any]:
    if entry != "auto":
        return make_solver(entry)
    return choose_solver(
        Problem(prior, protocol.likelihood(task, 0), shape=tuple(protocol.truth.shape[1:]))
    )


# ---- the methods


def degraded(protocol: Protocol, task: str) -> Figures:
    """The measurement itself, at the size of the photo."""
    figures = []
    for photo in range(protocol.photos):
        y = protocol.likelihood(task, photo).y
        if y.shape[-1] != protocol.size:
            y = F.interpolate(y, size=(protocol.size, protocol.size), mode="bicubic")
        elif task == "HDR":
            y = y / HDR_GAIN
        elif "inpaint" in task:
            operator = protocol.operator(task)
            assert isinstance(operator, LinearOperator)
            y = operator.adjoint(y)
        figures.append({**protocol.score(task, photo, y), "nfe": 0, "seconds": 0.0})
    return figures


def best_tv(
    protocol: Protocol, task: str, folder: Path | None = None, progress: bool = True
) -> Figures:
    """Figures of TV with the weight, and the coupling of colours, of highest mean PSNR over the photos.

    Weights are powers of the square root of 2: uphill from 8 until both neighbours are worse.
    """
    cells = Cells(folder, f"TV {task}", {"method": "TV", **protocol.identity(task)})
    found: dict[tuple[bool, int], Figures] = {}
    # A guess of how many weights it takes; the bar is stretched where it takes more.
    with progress_bar(12 * protocol.photos, f"TV, {task}", progress) as bar:

        def evaluate(coupled: bool, exponent: int) -> float:
            if (coupled, exponent) not in found:
                found[coupled, exponent] = [
                    _tv_cell(protocol, task, photo, coupled, exponent, cells, bar)
                    for photo in range(protocol.photos)
                ]
            return average(found[coupled, exponent], "psnr_mean")

        for coupled in (True, False):
            best = 6
            while True:
                around = max((best, best - 1, best + 1), key=lambda e: evaluate(coupled, e))
                if around == best or abs(around) > 24:
                    break
                best = around
    return max(found.values(), key=lambda figures: average(figures, "psnr_mean"))


def _tv_cell(
    protocol: Protocol, task: str, photo: int, coupled: bool, exponent: int, cells: Cells, bar: Any
) -> dict[str, Any]:
    truth, key = protocol.truth[photo], f"{'coupled' if coupled else 'channels'} {exponent}"
    known = cells.get(truth) or {}
    if key not in known:
        weight, start, cpu = 2 ** (exponent / 2), time.monotonic(), time.process_time()
        x = restore_tv(protocol.likelihood(task, photo), weight, coupled=coupled)
        spent = {"seconds": time.monotonic() - start, "cpu": time.process_time() - cpu}
        settings = {"nfe": 0, **spent, "weight": weight, "coupled": coupled}
        known[key] = {**protocol.score(task, photo, x), **settings}
        cells.put(truth, known)
    bar.total = max(bar.total or 0, bar.n + 1)
    bar.update(1)
    return known[key]


def run_solver(
    protocol: Protocol,
    task: str,
    solver: Solver[Any],
    prior: Prior,
    samples: int,
    folder: Path | None = None,
    device: str | None = None,
    progress: bool = True,
) -> Figures:
    """Figures of one solver on one task, each photo on its own."""
    name = type(solver).__name__
    identity = {
        "method": solver.settings,
        "code": _code(solver),
        "samples": samples,
        "prior": describe_prior(prior),
    }
    cells = Cells(folder, f"{name} {task}", {**identity, **protocol.identity(task)})
    figures = []
    total = protocol.photos * samples * solver.num_steps
    with progress_bar(total, f"{name}, {task}", progress) as bar:
        for photo in range(protocol.photos):
            cell = cells.get(protocol.truth[photo])
            if cell is None:
                problem = Problem(
                    prior, protocol.likelihood(task, photo), shape=tuple(protocol.truth.shape[1:])
                )
                start = time.process_time()
                result = driver.run(
                    solver,
                    problem,
                    samples,
                    seed=(protocol.seed << 32) + photo,
                    device=device,
                    progress=False,
                    on_nonfinite="drop",  # a lost sample shows as nan in the table
                    callbacks=[lambda report: bar.update(len(report.rows))],
                )
                cpu = time.process_time() - start
                if "interrupted" in result.status[0]:
                    raise KeyboardInterrupt
                cell = protocol.score(task, photo, result.samples[0])
                cell |= {"nfe": result.nfe, "seconds": result.seconds, "cpu": cpu}
                cells.put(protocol.truth[photo], cell)
            else:
                bar.update(samples * solver.num_steps)
            figures.append(cell)
    return figures


def _code(solver: Solver[Any]) -> str:
    """Hash of the solver's module: figures of a solver that was edited since are not taken from the folder."""
    try:
        source = inspect.getsource(sys.modules[type(solver).__module__])
    except (OSError, TypeError):  # typed at a prompt
        return ""
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def _as_mean(figures: Figures) -> Figures:
    """The mean of a photo's samples as an estimate of its own; its chi2 is not that of a sample."""
    return [
        {
            **cell,
            "psnr": [cell["psnr_mean"]],
            "ssim": [cell["ssim_mean"]],
            "chi2": [float("nan")],
            "nfe": cell["nfe"] * len(cell["psnr"]),
        }
        for cell in figures
    ]


# ---- print


def _per_task(cells: dict[str, Figures], name: str, form: str) -> str:
    """Return one number where the tasks agree, else one for each, in their order."""
    numbers = [format(average(figures, name), form) for figures in cells.values()]
    return "" if all(n == "nan" for n in numbers) else _joined(numbers)


def _joined(numbers: list[str]) -> str:
    return numbers[0] if len(set(numbers)) == 1 else " / ".join(numbers)


def count_worse(figures: Figures, before: Figures) -> int:
    """On how many photos an answer has less PSNR than the degraded photo, or none at all."""
    pairs = zip(columns(figures, "psnr"), columns(before, "psnr"), strict=True)
    return sum(not answer >= photo for answer, photo in pairs)


def _row(name: str, cells: dict[str, Figures], before: dict[str, Figures]) -> tuple[str, ...]:
    quality = [f"{average(f, 'psnr'):.2f} ({average(f, 'ssim'):.3f})" for f in cells.values()]
    if name == DEGRADED:
        return (name, *quality, "", "", "", "")
    calls = _per_task(cells, "nfe", ".0f")
    worse = [str(count_worse(figures, before[task])) for task, figures in cells.items()]
    return (
        name,
        *quality,
        _joined(worse),
        _per_task(cells, "chi2", ".2f"),
        calls,
        _per_task(cells, "seconds", ".2g"),
    )


def _gain(one: dict[str, Figures], other: dict[str, Figures], width: int) -> tuple[str, ...]:
    gains = [f"{average(one[t], 'psnr') - average(other[t], 'psnr'):+.2f}" for t in one]
    return ("auto over TV", *gains, *("",) * (width - 1 - len(gains)))


def _notes(
    protocol: Protocol, prior: str, methods: dict[str, dict[str, Figures]]
) -> tuple[str, ...]:
    weights = []
    for task, figures in methods.get(TV, {}).items():
        kind = "coupled" if figures[0]["coupled"] else "apart"
        weights.append(f"{task} {figures[0]['weight']:.3g}, colours {kind}")
    note = (
        f"Mean PSNR in dB (SSIM) over {protocol.photos} photos of {protocol.size} pixels, noise {protocol.noise:g}, "
        f"prior {prior}. Rows are single samples, their scores averaged, unless they say mean. chi2: 1 where a sample "
        "explains y to within its noise; missing pixels are left out. Worse: photos whose answer (of samples, the mean "
        "PSNR) has less PSNR than the degraded one. Several numbers: in the order of the tasks. "
        "Network calls per sample, of a mean for all; seconds per photo for all its samples."
    )
    if not weights:
        return (note,)
    return note, f"TV: its weight is the best on these very photos ({'; '.join(weights)})."


def _figures(methods: dict[str, dict[str, Figures]]) -> dict[str, Any]:
    names = ("psnr", "ssim", "chi2", "nfe", "seconds")
    return {
        method: {task: {n: average(figures, n) for n in names} for task, figures in cells.items()}
        for method, cells in methods.items()
    }
