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
from invguide.driver import resolve_device
from invguide.errors import InputError
from invguide.likelihood import Likelihood
from invguide.operators import GaussianBlur
from invguide.prior import Prior
from invguide.problem import Problem
from invguide.progress import progress_bar
from invguide.rng import Noise
from invguide.solvers import DPS
from invguide.tables import Table

SIZES = (32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)
SIGMA_Y = 0.05


def clock(device: torch.device) -> float:
    """Seconds: of this process's CPU time on the CPU, so that other processes do not count; else wall time."""
    if device.type == "cpu":
        return time.process_time()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(device: torch.device, function: Callable[[], object]) -> float:
    start = clock(device)
    function()
    return clock(device) - start


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
    clean = loaded.to_data(noise("clean") * loaded.sigma_data)
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

    managed()  # fills caches, and counts
    bare()
    pairs: list[tuple[float, float]] = []
    with progress_bar(repeats, "driver against bare calls", progress) as bar:
        for i in range(repeats):
            order = (managed, bare) if i % 2 else (bare, managed)
            times = {f: timed(where, f) for f in order}
            pairs.append((times[managed], times[bare]))
            bar.update(1)
    ratios = sorted(with_driver / without - 1 for with_driver, without in pairs)
    overhead = statistics.median(ratios)
    managed_ms, bare_ms = (
        1000 * statistics.median(column) / steps for column in zip(*pairs, strict=True)
    )
    found = {
        "network_ms": network,
        "driver_ms": managed_ms,
        "bare_ms": bare_ms,
        "overhead": overhead,
        "overhead_of_minima": min(a for a, _ in pairs) / min(b for _, b in pairs) - 1,
    }
    row = (
        f"{size} x {size}",
        *(f"{value:.1f}" for value in (network, bare_ms, managed_ms)),
        f"{overhead:+.1%}",
        f"{ratios[0]:+.1%} to {ratios[-1]:+.1%}",
        f"{found['overhead_of_minima']:+.1%}",
    )
    head = (
        "image",
        "network, ms",
        "bare step, ms",
        "driver step, ms",
        "overhead",
        "range",
        "of minima",
    )
    unit = "CPU" if where.type == "cpu" else "wall"
    note = (
        f"DPS, {steps} steps; a bare step is one network call and its vjp, and as many operator calls as the run has. "
        f"Medians of {repeats} pairs measured in turns, {unit} time; of minima: the fastest run of each kind, which "
        "other work on the machine disturbs least. The goal is at most +3 % for networks of 20 ms and up."
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
    if any(prior.shape[1:]):
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
