"""What a run will cost, measured on a few of its own steps: memory, calls and time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from invguide.api import prepare
from invguide.arguments.checks import checked
from invguide.arguments.rules import Count, FloatType
from invguide.driver import lay_out
from invguide.prior import Prior
from invguide.priors.wrappers.tiled import Tiled, Trial
from invguide.problem.data_size import measuring_calls
from invguide.problem.problem import Counters, Problem
from invguide.rng import Noise
from invguide.solver import EnsembleSolver, Solver
from invguide.system.devices import chunk_size, now, out_of_memory
from invguide.system.memory import peak_memory


@dataclass(frozen=True)
class Plan:
    """The cost of a run; prints as a few lines.

    Attributes:
        solver, num_steps, shape, device: Of the run.
        samples: In all, over the measurements.
        batch_size: How many of them advance together.
        network_calls, vjp_calls, forward_calls: In all; a batch of eight counts eight. Exact where all steps of the
            solver but the last make equally many, about right elsewhere; the driver's final check of the samples is
            left out.
        seconds: In all, without imports and loading.
        memory: Bytes of the weights and of the tensors that are alive at once. The program itself comes on top, and
            what operations use inside themselves and give back.
        free: Bytes that the device has left, weights included; None where that is unknown.
    """

    solver: str
    num_steps: int
    shape: tuple[int, ...]
    device: str
    samples: int
    batch_size: int
    network_calls: int
    vjp_calls: int
    forward_calls: int
    seconds: float
    memory: int
    free: int | None

    @property
    def fits(self) -> bool:
        """Whether memory suffices, as far as is known."""
        return self.free is None or self.memory <= self.free

    def __str__(self) -> str:
        free = "" if self.free is None else f" of {_size(self.free)} free"
        lines = [
            f"solver    {self.solver}, {self.num_steps} steps, {self.samples} "
            f"sample{'' if self.samples == 1 else 's'} of "
            f"{' x '.join(map(str, self.shape))}, {self.batch_size} at a time on {self.device}",
            f"calls     {self.network_calls} of the network, {self.vjp_calls} of its gradient, "
            f"{self.forward_calls} of the operator",
            f"memory    {_size(self.memory)}{free}",
            f"time      about {_duration(self.seconds)}",
        ]
        if not self.fits:
            lines.append(
                "too large: use priors.Tiled (--tile), prior.optimise(memory='low') or a smaller batch_size"
            )
        return "\n".join(lines)


@partial(checked, also=prepare)
def plan(
    y: Tensor | np.ndarray | Any,
    operator: Any,
    prior: Prior | str | Any,
    *,
    num_samples: Count | None = None,
    seed: int = 0,
    batch_size: Count | Literal["auto"] = "auto",
    device: str | torch.device | Sequence[str | torch.device] | None = None,
    dtype: FloatType | None = None,
    **problem: Any,
) -> Plan:
    """Return what `invguide.solve` with the same arguments will cost, from four of its steps.

    Args:
        y, operator, prior, num_samples, problem: As for `invguide.solve`: sigma_y, noise, solver, shape, condition.
        seed, batch_size, device, dtype: As for `invguide.driver.run`.
    """
    solver, target, _ = prepare(y, operator, prior, num_samples=num_samples, **problem)
    return plan_run(
        solver,
        target,
        num_samples,
        seed=seed,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
    )


def plan_run(
    solver: Solver[Any],
    problem: Problem,
    num_samples: int | None = None,
    *,
    seed: int = 0,
    batch_size: int | str = "auto",
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> Plan:
    """Return what `invguide.driver.run` with the same arguments will cost."""
    problem, rows, num_samples, devices, dtype = lay_out(
        solver, problem, num_samples, device, dtype
    )
    problem.batch_size = chunk_size(batch_size, problem.data_shape, devices[0])
    size = min(problem.batch_size, -(-len(rows) // len(devices)))
    size = num_samples if isinstance(solver, EnsembleSolver) else size
    free = _free(devices[0], problem.prior)
    told, once = problem.size.value is not None, 0
    while True:
        try:
            batch = _measure(solver, problem, rows[:size], seed, dtype, devices[0])
            if not told and problem.size.value is not None:  # measured on the way, once a run
                told, once = True, measuring_calls(problem.shape)
                continue
            break
        except RuntimeError as error:
            if size == 1 or batch_size != "auto" or not out_of_memory(error):
                raise
        problem.batch_size = problem.batch_size // 2 or 1
        size = size if isinstance(solver, EnsembleSolver) else size // 2
    rounds = -(-len(rows) // (size * len(devices)))
    network, vjp, forward = (round(c * len(rows) / size) for c in batch.calls)
    return Plan(
        solver=type(solver).__name__,
        num_steps=solver.num_steps,
        shape=problem.shape,
        device=", ".join(map(str, devices)),
        samples=len(rows),
        batch_size=size,
        network_calls=network + once,
        vjp_calls=vjp,
        forward_calls=forward,
        seconds=rounds * batch.seconds,
        memory=batch.memory,
        free=free,
    )


@dataclass(frozen=True)
class _Batch:
    """What one batch costs, from its start to its end."""

    calls: tuple[float, ...]
    seconds: float
    memory: int


def _measure(
    solver: Solver[Any],
    problem: Problem,
    rows: list[tuple[int, int]],
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
) -> _Batch:
    problem.counters = Counters()
    part = problem.rows(torch.tensor([b for b, _ in rows]))
    noise = Noise(seed, tuple(rows), problem.shape, dtype, device)
    with torch.no_grad(), _few_tiles(problem.prior) as skipped:

        def clock() -> float:  # as if no tile were left out
            return now(device) + sum(trial.seconds for trial in skipped)

        start = clock()
        state = solver.init(part, noise)
        seconds = clock() - start
        calls = np.array(astuple(problem.counters), float)
        # The first time fills caches, compiles, and is slowed down by the counting.
        memory = peak_memory(lambda: solver.step(part, state, 0, noise.at(0)), device)
        for k, weight in _steps(solver.num_steps):
            problem.counters.restore(Counters())
            start = clock()
            state, _ = solver.step(part, state, k, noise.at(k))
            seconds += weight * (clock() - start)
            calls += weight * np.array(astuple(problem.counters))
    held = [t for t in state if isinstance(t, Tensor)]
    memory += _bytes(held) + _weights(problem.prior)
    return _Batch(tuple(calls.tolist()), seconds, memory)


@contextmanager
def _few_tiles(prior: Prior) -> Iterator[list[Trial]]:
    """Inside, priors of tiles go through a few of them only: of a large picture, one call takes minutes."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(part.trial())
            for part in prior.modules()
            if isinstance(part, Tiled)
        ]


def _steps(num_steps: int) -> list[tuple[int, float]]:
    """Return which steps stand for all, and for how many each: the last for itself, two for their halves of the rest.

    Some solvers look ahead less and less far, and the last step of many is a shorter one.
    """
    rest = num_steps - 1
    halves = [(rest // 4, rest / 2), (3 * rest // 4, rest / 2)] if rest else []
    return [*halves, (rest, 1.0)]


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _weights(prior: Prior) -> int:
    return _bytes([*prior.parameters(), *prior.buffers()])


def _free(device: torch.device, prior: Prior) -> int | None:
    """Bytes that are left on a device, and those of the weights that are there already."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + _weights(prior)
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + _weights(prior)
    except (AttributeError, OSError, ValueError):  # not told by this system
        return None


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 2 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
