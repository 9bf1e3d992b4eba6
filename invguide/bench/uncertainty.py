"""Whether the spread of the samples tells the size of the error, on photos."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from invguide.api import make_solver
from invguide.bench.protocol import TASKS, Protocol, average, check_tasks, load_in
from invguide.bench.restoration import run_solver
from invguide.errors import InputError
from invguide.prior import Prior
from invguide.solver import Solver
from invguide.system.tables import Table


def calibration(
    data: str | Path,
    *,
    size: int = 128,
    photos: int = 28,
    noise: float = 0.025,
    prior: str | Prior = "natural",
    precision: str = "fp32",
    solver: str | Solver[Any] = "DPS",
    tasks: Sequence[str] = tuple(TASKS),
    samples: int = 8,
    out: str | Path | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: bool = True,
) -> Table:
    """Compare the actual error of the mean of the samples with the one that their spread predicts.

    Arguments are as for `restore`, and with the same `out` its samples are used again.

    Returns:
        For each task: the root mean square error of the mean; its prediction sqrt((1 + 1/S) var); their ratio, pooled
        over photos, and its range; the share of pixels that lie within mean +- 1.645 std, and that of an exact sampler
        with as many samples, were its posterior normal; the continuous ranked probability score.
    """
    if samples < 2:
        raise InputError(f"samples is {samples}; the spread takes at least 2")
    check_tasks(tasks)
    protocol = Protocol(Path(data), size, photos, noise, seed)
    loaded, method = load_in(prior, precision), make_solver(solver)
    folder = None if out is None else Path(out)
    exact = expected_coverage(samples)
    rows: list[tuple[str, ...]] = []
    found: dict[str, dict[str, float]] = {}
    for task in tasks:
        cells = run_solver(protocol, task, method, loaded, samples, folder, device, progress)
        actual = average(cells, "error2") ** 0.5
        predicted = ((1 + 1 / samples) * average(cells, "variance")) ** 0.5
        ratio = actual / predicted if predicted > 0 else float("inf")
        each = [cell["ratio"] for cell in cells]
        coverage, score = average(cells, "coverage"), 100 * average(cells, "crps")
        found[task] = {
            "error": actual,
            "predicted": predicted,
            "ratio": ratio,
            "coverage": coverage,
            "crps": score,
        }
        span = f"{min(each):.2f}-{max(each):.2f}"
        numbers = (f"{actual:.4f}", f"{predicted:.4f}", f"{ratio:.2f}")
        rows.append((task, *numbers, span, f"{coverage:.1%}", f"{exact:.1%}", f"{score:.3f}"))
    head = (
        "task",
        "actual error",
        "predicted",
        "ratio",
        "range over photos",
        "within 90 %",
        "exact",
        "CRPS x 100",
    )
    notes = (
        f"{type(method).__name__}, {samples} samples of each of {photos} photos of {size} pixels, noise {noise:g}. "
        "Ratio: actual over predicted error of the mean; 1 for an exact sampler, above 1 where the samples claim to "
        "know more than they do. It says whether the spread has the right size on average over all pixels; not whether "
        "it is in the right places, nor whether the prior is right about photos. Within 90 %: pixels of the photo in "
        f"mean +- 1.645 std; exact: what that would be for {samples} samples of a normal posterior. "
        "CRPS: of the pixels, fair in the number of samples; lower is better, and only the right law is best.",
    )
    return Table(head, tuple(rows), notes, found)


def expected_coverage(samples: int) -> float:
    """P(|truth - mean| <= 1.645 std) where truth and samples are independent draws from one normal distribution."""
    from scipy.stats import t

    # (truth - mean) / (std sqrt(1 + 1/S)) follows Student's law with S - 1 degrees of freedom.
    return float(2 * t.cdf(1.645 / (1 + 1 / samples) ** 0.5, samples - 1) - 1)
