"""The table of steps: how many network calls a point estimator needs, task by task, in one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from invguide.bench.protocol import TASKS, Protocol, average, check_tasks, load_in
from invguide.bench.restoration import degraded, resolve, run_solver
from invguide.errors import InputError
from invguide.prior import Prior
from invguide.solvers import HQS
from invguide.system.tables import Table

STEPS = (4, 8, 15, 20, 30)


def steps(
    data: str | Path,
    *,
    size: int = 128,
    photos: int = 28,
    noise: float = 0.025,
    prior: str | Prior = "natural",
    precision: str = "fp32",
    tasks: Sequence[str] = (*TASKS, "motion deblur"),
    numbers: Sequence[int] = STEPS,
    out: str | Path | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: bool = True,
) -> Table:
    """Restore photos by HQS with several numbers of steps, one network call each.

    Args:
        data: An .npz file with uint8 photos `img_SIZE` (N, SIZE, SIZE, 3).
        size, photos, noise: Which photos, how many, and the standard deviation of the noise in [0, 1].
        prior: A prior or its name.
        precision: Of the prior's network: "fp32", "bf16" or "fp16".
        tasks: As for `restore`, linear ones.
        numbers: Of steps.
        out: Folder that keeps the figures of each photo; a second call goes on from there.
        seed: Of the noise.
        device: As for `invguide.solve`.
        progress: Show a bar.

    Returns:
        For each task the mean PSNR over photos, degraded and for each number of steps; the number that `auto` takes,
        and what it loses to the best of these.

    Raises:
        InputError: No number of steps, or one below 1; no such task or photos; a task for which `auto` is not HQS.
    """
    check_tasks(tasks)
    if not numbers or min(numbers) < 1:
        raise InputError(f"numbers of steps are {list(numbers)}; expected some, all at least 1")
    protocol = Protocol(Path(data), size, photos, noise, seed)
    loaded = load_in(prior, precision)
    folder = None if out is None else Path(out)
    rows, figures = [], {}
    for task in tasks:
        chosen = resolve("auto", protocol, task, loaded)
        if not isinstance(chosen, HQS):
            raise InputError(
                f"task {task!r}: auto takes {type(chosen).__name__}; this is about HQS"
            )
        quality: dict[int, float] = {}
        for number in sorted({*numbers, chosen.num_steps}):
            solver = replace(chosen, num_steps=number)
            cells = run_solver(protocol, task, solver, loaded, 1, folder, device, progress)
            quality[number] = average(cells, "psnr")
        figures[task] = quality
        rows.append(
            _row(task, average(degraded(protocol, task), "psnr"), quality, numbers, chosen)
        )
    head = ("task", "degraded", *(str(n) for n in numbers), "auto", "auto less best")
    name = prior if isinstance(prior, str) else type(prior).__name__
    note = (
        f"Mean PSNR in dB over {photos} photos of {size} pixels, noise {noise:g}, prior {name} in {precision}, by HQS "
        "with so many steps, one network call each."
    )
    return Table(head, tuple(rows), (note,), figures)


def _row(
    task: str, before: float, quality: dict[int, float], numbers: Sequence[int], chosen: HQS
) -> tuple[str, ...]:
    cells = (f"{quality[n]:.2f}" for n in numbers)
    lost = quality[chosen.num_steps] - max(quality.values())
    return (task, f"{before:.2f}", *cells, str(chosen.num_steps), f"{lost:+.2f}")
