"""What black boxes cost: calls per second of a simulator that sleeps, and the time a call takes beyond its own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from invguide.blackbox import BlackBox
from invguide.errors import InputError
from invguide.system.progress import progress_bar
from invguide.system.tables import Table

SHAPE = (64, 64)


def blackbox(
    *,
    workers: int = 4,
    milliseconds: float = 50.0,
    calls: int = 80,
    repeats: int = 3,
    progress: bool = True,
) -> Table:
    """Time a simulator that sleeps, and one that does nothing, in this process and in workers.

    Args:
        workers: Processes, to compare with one.
        milliseconds: How long a call sleeps: asleep, workers do not compete for cores.
        calls: In a batch, of 64 x 64 numbers each.
        repeats: Batches of each kind, in turns; medians are taken.
        progress: Show a bar.

    Returns:
        Calls per second, their ratio to one worker, and the milliseconds per call that a simulator without work takes.
    """
    if min(workers, calls, repeats) < 1 or milliseconds < 0:
        raise InputError(
            f"workers={workers}, calls={calls}, repeats={repeats}, milliseconds={milliseconds:g}; expected at least 1 "
            f"of each and no negative time"
        )

    def sleeping(x: np.ndarray, seconds: float) -> np.ndarray:
        if seconds:
            time.sleep(seconds)
        return x

    engines: dict[str, dict[str, Any]] = {
        "this process": {},
        "1 worker": {"workers": 1},
        f"{workers} workers": {"workers": workers},
    }
    boxes = {
        (name, busy): BlackBox(partial(sleeping, seconds=busy * milliseconds / 1000), **settings)
        for name, settings in engines.items()
        for busy in (True, False)
    }
    times: dict[tuple[str, bool], list[float]] = {key: [] for key in boxes}
    x = torch.zeros(calls, *SHAPE)
    with progress_bar((repeats + 1) * len(boxes), "calls of black boxes", progress) as bar:
        for i in range(repeats + 1):
            for key, box in boxes.items():
                spent = _wall(partial(box, x))
                if i:  # workers start in the first round
                    times[key].append(spent)
                bar.update(1)
    for box in boxes.values():
        box.close()
    return _table(times, list(engines), calls, milliseconds, repeats)


def _wall(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _table(
    times: dict[tuple[str, bool], list[float]],
    names: list[str],
    calls: int,
    milliseconds: float,
    repeats: int,
) -> Table:
    rates = {name: calls / statistics.median(times[name, True]) for name in names}
    found = {
        name: {
            "calls_per_second": rates[name],
            "speed_up": rates[name] / rates["1 worker"],
            "overhead_ms": 1000 * statistics.median(times[name, False]) / calls,
        }
        for name in names
    }
    rows = tuple(
        (name, f"{f['calls_per_second']:.1f}", f"{f['speed_up']:.2f}", f"{f['overhead_ms']:.2f}")
        for name, f in found.items()
    )
    head = ("calls run in", "calls per second", "over 1 worker", "overhead, ms per call")
    note = (
        f"A simulator that sleeps {milliseconds:g} ms, batches of {calls} calls of {SHAPE[0]} x {SHAPE[1]} numbers, "
        f"median of {repeats}, wall time, workers started before. Overhead: time per call of a simulator that returns "
        "at once. The goals are 3.6 times the calls of one worker for four, and an overhead under 2 ms."
    )
    return Table(head, rows, (note,), found)
