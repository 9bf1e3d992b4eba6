"""What the driver costs: a run of DPS against the bare network, vjp and operator calls of the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from invguide import driver as driver_module
from invguide.api import load_prior
from invguide.errors import InputError
from invguide.likelihood import Likelihood
from invguide.operators import GaussianBlur
from invguide.prior import Prior
from invguide.problem.problem import Problem
from invguide.rng import Noise
from invguide.solvers import DPS
from invguide.system.devices import now, resolve_device
from invguide.system.progress import progress_bar
from invguide.system.tables import Table

SIZES = (32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)
SIGMA_Y = 0.05


def clock(device: torch.device) -> float:
    """Seconds: of this process's CPU time on the CPU, so that other processes do not count; else wall time."""
    return time.process_time() if device.type == "cpu" else now(device)


def timed(device: torch.device, function: Callable[[], object]) -> float:
    start = clock(device)
    function()
    return clock(device) - start


# Longer than 60 lines: the same problem for each side of the comparison.
def driver(
    *,
    prior: str | Prior = "natural",
    min_network_ms: float = 20.0,
    steps: int = 50,
    repeats: int = 9,
    seed: int = 0,
    device: str | None = None,
    progress: bool = True,
) -> Table:
    """Time DPS under the driver, and the same calls in a bare loop, in turns in one process.

    Args:
        prior: A prior or its name, for images of any size.
        min_network_ms: The image is enlarged until one network call takes this long.
        steps, repeats: Steps of a run; runs of each kind. The ratio is the median over pairs.
        seed: Of measurement and samples.
        device: As for `invguide.solve`.
        progress: Show a bar.

    Returns:
        Milliseconds per step of both, and the overhead of the driver.
    """
    if steps < 1 or repeats < 1:
        raise InputError(f"steps={steps}, repeats={repeats}; expected at least 1")
    where = resolve_device(device)
    loaded = load_prior(prior).to(where)
    size, network = _size_for(loaded, min_network_ms, where)
    shape = (3, size, size)
    noise = Noise(seed, ((0, 0),), shape, torch.float32, where)
    operator = GaussianBlur(sigma=1.5).to(where)
    clean = loaded.to_data(noise("clean") * (loaded.sigma_data or 1.0))
    y = operator(clean) + SIGMA_Y * noise("measurement")
    likelihood = Likelihood(operator, y, SIGMA_Y)
    solver = DPS(num_steps=steps)
    problem = Problem(loaded, likelihood, shape=shape)
    levels = [problem.levels(solver.schedule, steps, k)[0] for k in range(steps)]
    states = [a * noise("state") for a in levels]

    calls: list[int] = []  # of the operator, per run

    def managed() -> None:
        result = driver_module.run(
            solver, problem, seed=seed, device=where, progress=False, on_nonfinite="drop"
        )
        calls[:] = [result.manifest["forward_calls"]]

    def bare() -> None:
        for a, x in zip(levels, states, strict=True):
            _guided_call(loaded, operator, y, x, a)
        for _ in range(calls[0] - steps):
            operator(clean)

    def alone() -> None:
        with torch.no_grad():
            state = solver.init(problem, noise)
            for k in range(steps):
                state, _ = solver.step(problem, state, k, noise.at(k))

    runs = (managed, alone, bare)
    managed()  # fills caches, and counts
    times: dict[Callable[[], None], list[float]] = {run: [] for run in runs}
    with progress_bar(repeats, "driver against bare calls", progress) as bar:
        for i in range(repeats):
            for run in runs if i % 2 else runs[::-1]:
                times[run].append(timed(where, run))
            bar.update(1)
    ratios = sorted(a / b - 1 for a, b in zip(times[managed], times[bare], strict=True))
    overhead = statistics.median(ratios)
    medians = {run: 1000 * statistics.median(times[run]) / steps for run in runs}
    found = {
        "network_ms": network,
        "bare_ms": medians[bare],
        "solver_ms": medians[alone],
        "driver_ms": medians[managed],
        "overhead": overhead,
        "overhead_of_minima": min(times[managed]) / min(times[bare]) - 1,
    }
    row = (
        f"{size} x {size}",
        *(f"{ms:.1f}" for ms in (network, medians[bare], medians[alone], medians[managed])),
        f"{overhead:+.1%}",
        f"{ratios[0]:+.1%} to {ratios[-1]:+.1%}",
        f"{found['overhead_of_minima']:+.1%}",
    )
    head = ("image", "network, ms", "bare", "solver", "driver", "overhead", "range", "of minima")
    unit = "CPU" if where.type == "cpu" else "wall"
    note = (
        f"DPS, {steps} steps, ms per step. Bare: one network call and its vjp, and as many operator calls as the run "
        "has. Solver: its steps in a plain loop. Driver: the whole run. Overhead: of driver over bare, median of "
        f"{repeats} pairs measured in turns, {unit} time; of minima: from the fastest run of each, which other work "
        "on the machine disturbs least. The goal is at most +3 % for networks of 20 ms and up."
    )
    return Table(head, (row,), (note,), found)


def _guided_call(prior: Prior, operator: GaussianBlur, y: Tensor, x: Tensor, a: float) -> Tensor:
    """The network, the operator and the gradient of |y - A D(x)|^2, and nothing else."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        denoised = prior.denoise(x, torch.tensor(a, dtype=x.dtype, device=x.device))
        loss = (y - operator(prior.to_data(denoised))).square().sum()
        return torch.autograd.grad(loss, x)[0]


def _size_for(prior: Prior, milliseconds: float, device: torch.device) -> tuple[int, float]:
    """Return the smallest size at which a network call takes so long, and how long it takes."""
    if prior.shape != (3, None, None):
        raise InputError(f"the prior takes images of {prior.shape} only; use one for any size")
    size, spent = SIZES[0], 0.0
    for size in SIZES:
        call = partial(prior.denoise, torch.zeros(1, 3, size, size, device=device), 1.0)
        with torch.no_grad():
            call()
            spent = 1000 * statistics.median(timed(device, call) for _ in range(5))
        if spent >= milliseconds:
            break
    return size, spent
