"""The driver: it owns the loop, chunks, random numbers, checkpoints, progress, failure and counting."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from invguide.arguments.checks import checked
from invguide.arguments.rules import Count, FloatType
from invguide.engine.checkpoint import save_checkpoint
from invguide.engine.loop import Loop, RunSettings, Shared, StepReport, run_all
from invguide.engine.manifest import result_of
from invguide.engine.run_identity import Identity, check_trust, run_identity
from invguide.engine.run_state import Progress, restored
from invguide.problem.problem import Problem
from invguide.result import Result
from invguide.solver import Solver, check_compatible, sample_count
from invguide.system.devices import chunk_size, resolve_devices
from invguide.system.progress import progress_bar
from invguide.system.run_file import only_run, sweep
from invguide.system.surroundings import outside_inference, thaw
from invguide.system.threads import warn_if_spinning


@outside_inference
@checked
def run(
    solver: Solver[Any],
    problem: Problem,
    num_samples: Count | None = None,
    *,
    seed: int = 0,
    batch_size: Count | Literal["auto"] = "auto",
    device: str | torch.device | Sequence[str | torch.device] | None = None,
    dtype: FloatType | None = None,
    progress: bool = True,
    callbacks: Sequence[Callable[[StepReport], None]] = (),
    checkpoint: str | Path | None = None,
    checkpoint_every: Count = 10,
    trust: str | Sequence[str] = (),
    on_nonfinite: Literal["raise", "drop"] = "raise",
) -> Result:
    """Draw num_samples samples for every measurement of the problem.

    Args:
        solver: The algorithm and its hyper-parameters.
        problem: Prior, likelihood or reward.
        num_samples: Samples per measurement, 1 by default; ensemble methods return their ensemble.
        seed: Sample i of measurement b depends on (seed, b, i) only, not on how samples are batched: to the last bit
            where the shapes of the arithmetic are the same, as after an interruption, to rounding where they are not.
        batch_size: Samples that advance together, or "auto": what suits the device, and half of it whenever memory
            turns out to be short; of an ensemble, members in one network call.
        device: "cpu", "cuda", ...; by default CUDA where there is one. A list, or "cuda:all", shares the samples out
            among several; how many changes the result by rounding only.
        dtype: Type of the state; by default the prior's, but at least float32.
        progress: Show a progress bar once the run has taken two seconds.
        callbacks: Called with a StepReport after every step.
        checkpoint: File to write and, where it exists, to resume from. It goes on only with the same problem: solver,
            prior, operator, noise, reward, y, condition, whatever code and values they are made of. While the run
            lasts, no other run can use it.
        checkpoint_every: Steps between two writes.
        trust: Of these parts, those that you know to be the same although they look otherwise, or cannot be read
            (`manifest["cannot_be_told_apart"]`): the checkpoint goes on with them.
        on_nonfinite: "raise" stops at the first sample that diverges; "drop" goes on with the others.

    Returns:
        The result; after Ctrl-C, what was finished by then, with the checkpoint written.

    Raises:
        CompatibilityError: Solver and problem do not fit (before any network call).
        DivergenceError: A sample became non-finite or left the data by orders of magnitude, or ends too large for a
            clean signal and as a worse answer than none (`invguide.engine.divergence`). Samples that are merely odd are
            returned, with a line in `Result.warnings`.
        CheckpointError: The checkpoint is damaged, belongs to other settings or is in use; or it cannot be written,
            which is tried before the first network call.
    """
    problem, rows, num_samples, devices, dtype = lay_out(
        solver, problem, num_samples, device, dtype
    )
    if devices[0].type == "cpu":
        warn_if_spinning()
    trusted = check_trust(trust)
    path = None if checkpoint is None else Path(checkpoint).expanduser().resolve()
    identity = run_identity(solver, problem, num_samples, seed, dtype)
    size = (problem.num_measurements, num_samples, problem.data_shape, dtype)
    state = Progress.blank(*size)
    total = len(rows) * solver.num_steps
    with nullcontext() if path is None else only_run(path):
        if path is not None:
            state = _begin(path, identity, state, solver, trusted)
            for operator in problem.operators():
                operator.keep(path.with_name(f"{path.name}.calls"))
        settings = RunSettings(
            solver=solver,
            seed=seed,
            dtype=dtype,
            on_nonfinite=on_nonfinite,
            path=path,
            checkpoint_every=checkpoint_every,
            callbacks=callbacks,
            num_devices=len(devices),
            patient=batch_size == "auto",
        )
        with progress_bar(total, type(solver).__name__, progress) as bar:
            bar.update(len(state.status) * solver.num_steps)
            problem.size.value = problem.size.value or state.data_size
            shared = Shared(settings, state, rows, identity, bar, problem.size)
            loops = [
                Loop(
                    problem if i == 0 else problem.replica(where, dtype),
                    shared,
                    where,
                    chunk_size(batch_size, problem.data_shape, where),
                )
                for i, where in enumerate(devices)
            ]
            interrupted = run_all(loops, shared)
    shared.stop_clock()
    names = [str(where) for where in devices]
    return result_of(shared, loops[0].problem, num_samples, interrupted, names)


def _begin(
    path: Path, identity: Identity, blank: Progress, solver: Solver[Any], trust: frozenset[str]
) -> Progress:
    """How far the run is: nowhere, or where its checkpoint ends. See that there can be one, before all else."""
    sweep(path)
    state = restored(path, identity, blank, solver, trust) if path.exists() else blank
    save_checkpoint(path, identity, state.content(), trial=True)
    unknown = {name: parts for name, parts in identity.unknown.items() if name not in trust}
    if unknown:
        text = "; ".join(f"{name}: {', '.join(parts)}" for name, parts in unknown.items())
        warnings.warn(
            f"parts of this run cannot be read, so that nobody can tell whether a later one is the same ({text}); to "
            f"go on from its checkpoint will take trust={sorted(unknown)}"
        )
    return state


class Layout(NamedTuple):
    """What a run works on, and where."""

    problem: Problem  # on the first device
    rows: list[tuple[int, int]]  # (measurement, sample) of all
    num_samples: int
    devices: list[torch.device]
    dtype: torch.dtype


def lay_out(
    solver: Solver[Any],
    problem: Problem,
    num_samples: int | None,
    device: str | torch.device | Sequence[str | torch.device] | None,
    dtype: torch.dtype | None,
) -> Layout:
    """Check that solver and problem fit, and settle what `run` was not told; arguments as there."""
    count = sample_count(solver, num_samples)
    check_compatible(solver, problem)
    if solver.point_estimate and count > 1:
        name = type(solver).__name__
        warnings.warn(
            f"{name} is a point estimator: {count} samples of it are one answer, and their std is NaN; "
            "use solver='auto' for samples, or num_samples=1"
        )
    devices = resolve_devices(device)
    # Whatever the network's own type, steps between neighbouring levels are lost in half precision.
    exact = dtype or torch.promote_types(problem.prior.dtype, torch.float32)
    for module in (problem.prior, *problem.operators()):
        thaw(module)
    rows = [(b, s) for b in range(problem.num_measurements) for s in range(count)]
    return Layout(problem.to(devices[0], exact), rows, count, devices, exact)
