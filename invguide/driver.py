"""The only loop: it owns chunks, random numbers, checkpoints, progress, failure and counting."""

from __future__ import annotations

import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from invguide.arguments.checks import checked
from invguide.arguments.rules import Count, FloatType
from invguide.engine.checkpoint import save_checkpoint
from invguide.engine.identity import Identity, check_trust, run_identity, versions
from invguide.engine.inspection import Inspector, target_name
from invguide.engine.run_state import Chunk, Progress, restored
from invguide.errors import DivergenceError
from invguide.numerics.linear import InnerSolves, counted_solves
from invguide.problem.data_size import SharedSize
from invguide.problem.problem import Counters, Problem
from invguide.problem.seen import Seen
from invguide.result import Result
from invguide.rng import Noise
from invguide.solver import Solver, check_compatible, sample_count
from invguide.system.devices import chunk_size, out_of_memory, resolve_devices
from invguide.system.progress import progress_bar
from invguide.system.run_file import only_run, sweep
from invguide.system.surroundings import outside_inference, thaw
from invguide.system.threads import warn_if_spinning


class StepReport(NamedTuple):
    """What a callback gets after each step; `estimate()` is in data units, (rows, *shape)."""

    step: int
    num_steps: int
    rows: tuple[tuple[int, int], ...]
    info: NamedTuple
    estimate: Callable[[], Tensor]


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
        with progress_bar(total, type(solver).__name__, progress) as bar:
            bar.update(len(state.status) * solver.num_steps)
            problem.size.value = problem.size.value or state.data_size
            shared = _Shared(
                state, rows, path, checkpoint_every, identity, bar, callbacks, problem.size
            )
            loops = [
                _Loop(
                    solver,
                    problem if i == 0 else problem.replica(where, dtype),
                    shared,
                    seed,
                    where,
                    dtype,
                    on_nonfinite,
                    chunk_size(batch_size, problem.data_shape, where),
                    len(devices),
                    batch_size == "auto",
                )
                for i, where in enumerate(devices)
            ]
            interrupted = _run_all(loops, shared)
    shared.stop_clock()
    return loops[0].result(identity, num_samples, interrupted, [str(d) for d in devices])


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


def _run_all(loops: list[_Loop], shared: _Shared) -> bool:
    """Run the loops, one for each device, to the end; whether Ctrl-C came in between."""
    try:
        if len(loops) == 1:
            loops[0].run()
            return False
        with ThreadPoolExecutor(len(loops)) as pool:
            futures = [pool.submit(loop.run) for loop in loops]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:  # the others stop after their step
                shared.stop = any(not future.done() for future in futures)
        for future in futures:
            future.result()
    except KeyboardInterrupt:
        shared.save()
        return True
    return False


@dataclass
class _Shared:
    """What the loops of all devices have in common; whoever changes it holds the lock."""

    progress: Progress
    rows: list[tuple[int, int]]
    path: Path | None
    checkpoint_every: int
    identity: Identity
    bar: Any
    callbacks: Sequence[Callable[[StepReport], None]]
    size: SharedSize
    stop: bool = False
    counters: list[Counters] = field(default_factory=list)
    inner: list[InnerSolves] = field(default_factory=list)  # since the last start

    def __post_init__(self) -> None:
        self.lock = threading.RLock()
        self.tick = time.monotonic()
        self.resumed = deque(self.progress.chunks)
        begun = {row for chunk in self.resumed for row in chunk.rows}
        self.pending = deque(
            r for r in self.rows if r not in self.progress.status and r not in begun
        )
        self.counters.append(Counters(*self.progress.counters))

    def next_chunk(self, size: int) -> Chunk | None:
        """Take what was begun before an interruption, or else up to `size` samples; None where none are left."""
        with self.lock:
            if self.resumed:
                return self.resumed.popleft()
            if not self.pending:
                return None
            chunk = Chunk([self.pending.popleft() for _ in range(min(size, len(self.pending)))])
            self.progress.chunks.append(chunk)
            return chunk

    def stop_clock(self) -> None:
        now = time.monotonic()
        self.progress.seconds += now - self.tick
        self.tick = now
        self.progress.counters = [
            sum(getattr(c, name) for c in self.counters) for name in ("network", "vjp", "forward")
        ]

    def save(self) -> None:
        with self.lock:
            self.stop_clock()
            if self.path is None:
                return
            self.progress.data_size = self.size.value
            save_checkpoint(self.path, self.identity, self.progress.content())


@dataclass
class _Loop:
    """The loop of one device."""

    solver: Solver[Any]
    problem: Problem
    shared: _Shared
    seed: int
    device: torch.device
    dtype: torch.dtype
    on_nonfinite: str
    batch_size: int  # rows in one network call
    num_devices: int
    patient: bool  # halves the batch where memory is short

    def __post_init__(self) -> None:
        self.progress = self.shared.progress
        self.problem.counters = Counters()
        self.inner = InnerSolves()
        self.shared.inner.append(self.inner)
        self.shared.counters.append(self.problem.counters)
        self.problem.batch_size = self.batch_size
        self.rows = min(self.batch_size, -(-len(self.shared.rows) // self.num_devices))
        self.operators = self.problem.operators()
        self._guided = self.solver.requires.target != "none"
        self.inspector = Inspector(self.solver, self.problem.prior.sigma_max, self._bind)

    def run(self) -> None:
        """Take chunks until there are none."""
        ensemble = self.solver.settings["ensemble_size"] if self.solver.requires.ensemble else 0
        with torch.no_grad(), counted_solves(self.inner):
            while not self.shared.stop:
                chunk = self.shared.next_chunk(ensemble or self.rows)
                if chunk is None:
                    return
                self.advance(chunk)

    def advance(self, chunk: Chunk) -> None:
        """Carry one chunk from where it is to the end, and store its samples."""
        solver, shared = self.solver, self.shared
        if chunk.state is not None:
            chunk.state = type(chunk.state)(*(t.to(self.device) for t in chunk.state))
            shared.bar.update(chunk.step * len(chunk.rows))
        part, noise = self._bind(chunk.rows, chunk.seen)
        while chunk.rows and (chunk.state is None or chunk.step < solver.num_steps):
            if shared.stop:
                return
            k = -1 if chunk.state is None else chunk.step
            outcome = self._attempt(chunk, part, noise, k)
            if outcome is None:
                part, noise = self._halve(chunk)
                continue
            with shared.lock:
                before, begun = len(chunk.rows), chunk.state
                chunk.state, info = outcome
                chunk.step = k + 1
                part, noise = self._drop(chunk, k, part, noise, begun)
                if k < 0:
                    continue
                lost = before - len(chunk.rows)
                shared.bar.update(len(chunk.rows) + lost * (solver.num_steps - k))
                self._report(chunk, k, info)
        with shared.lock:
            if chunk.rows:
                self._finish(chunk, part)
            shared.progress.chunks.remove(chunk)
            if shared.path is not None:
                shared.save()

    def _attempt(
        self, chunk: Chunk, part: Problem, noise: Noise, k: int
    ) -> tuple[Any, Any] | None:
        """Return the state after step k (-1: the first state) and its info; None where memory was short."""
        counters = replace(self.problem.counters)
        try:
            if k < 0:
                return self.solver.init(part, noise), None
            return self.solver.step(part, chunk.state, k, noise.at(k))
        except DivergenceError as error:  # nothing is left of an ensemble
            raise self.inspector.explained(error, chunk.rows, k, chunk.state) from error
        except RuntimeError as error:
            if not (self.patient and self.batch_size > 1 and out_of_memory(error)):
                raise
        self.problem.counters.restore(counters)  # calls that count are those that led somewhere
        return None

    def _halve(self, chunk: Chunk) -> tuple[Problem, Noise]:
        """Go on with half of the batch; what is left of a chunk starts over later, with the same random numbers."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.problem.batch_size = self.batch_size = self.batch_size // 2
        if not self.solver.requires.ensemble and len(chunk.rows) > 1:
            size = self.rows = len(chunk.rows) // 2
            with self.shared.lock:
                later = chunk.rows[size:]
                self.shared.pending.extendleft(reversed(later))
                self.shared.bar.update(-chunk.step * len(later))
                chunk.rows = chunk.rows[:size]
                if chunk.state is not None:
                    chunk.state = type(chunk.state)(*(t[:size] for t in chunk.state))
        return self._bind(chunk.rows, chunk.seen)

    def _report(self, chunk: Chunk, k: int, info: Any) -> None:
        solver, shared = self.solver, self.shared
        shared.bar.set_postfix_str(
            ", ".join(filter(None, (o.progress_text() for o in self.operators))), refresh=False
        )
        for callback in shared.callbacks:
            estimate = lambda s=chunk.state: self.problem.prior.to_data(solver.estimate(s))  # noqa: E731
            callback(StepReport(k, solver.num_steps, tuple(chunk.rows), info, estimate))
        if (
            shared.path is not None
            and chunk.step % shared.checkpoint_every == 0
            and chunk.step < solver.num_steps
        ):
            shared.save()

    def _bind(
        self, rows: list[tuple[int, int]], seen: Seen | None = None
    ) -> tuple[Problem, Noise]:
        index = torch.tensor([b for b, _ in rows], dtype=torch.long)
        noise = Noise(self.seed, tuple(rows), self.problem.shape, self.dtype, self.device)
        part = self.problem.rows(index)
        part.seen = seen
        return part, noise

    def _drop(
        self, chunk: Chunk, k: int, part: Problem, noise: Noise, begun: Any
    ) -> tuple[Problem, Noise]:
        """Check the state after step k, which began at `begun`; raise, or take the lost samples out of the chunk."""
        lost = self.inspector.broken(chunk.state, k, chunk.rows, begun)
        if not lost:
            return part, noise
        if self.solver.requires.ensemble or self.on_nonfinite == "raise":
            raise DivergenceError(next(iter(lost.values())))
        for i, text in lost.items():
            self.progress.status[chunk.rows[i]] = f"dropped: {text}"
        keep = torch.tensor([i for i in range(len(chunk.rows)) if i not in lost], dtype=torch.long)
        chunk.state = type(chunk.state)(*(t[keep.to(t.device)] for t in chunk.state))
        chunk.rows = [chunk.rows[i] for i in keep.tolist()]
        return self._bind(chunk.rows, chunk.seen)

    def _finish(self, chunk: Chunk, part: Problem) -> None:
        x0 = self.solver.estimate(chunk.state)
        log_prob, chi2 = part.evaluate(x0)
        log_weights = self.solver.log_weights(chunk.state)
        weights = torch.zeros_like(log_prob) if log_weights is None else log_weights
        self._keep(chunk, part, x0, log_prob, chi2, torch.softmax(weights, 0))
        data = part.prior.to_data(x0)
        for i, (b, s) in enumerate(chunk.rows):
            if (b, s) in self.progress.status:
                continue
            self.progress.samples[b, s] = data[i]
            self.progress.chi2[b, s], self.progress.log_prob[b, s] = chi2[i], log_prob[i]
            if log_weights is not None:
                self.progress.log_weights[b, s] = log_weights[i]
            self.progress.status[(b, s)] = "ok"

    def _keep(
        self,
        chunk: Chunk,
        part: Problem,
        x0: Tensor,
        log_prob: Tensor,
        chi2: Tensor,
        weights: Tensor,
    ) -> None:
        """Note what is odd about samples; raise, or drop them, where they are lost: of an ensemble unless most are."""
        unguided = self.inspector.unguided(part, chunk.rows, chunk.seen, log_prob)
        found = self.inspector.outcome(part, chunk.rows, x0, log_prob, chi2, weights)
        found.lost.update(unguided)
        for b, s in {b: (b, s) for b, s in reversed(chunk.rows)}.values():
            text = chunk.seen.warning(b, target_name(part)) if self._guided else ""
            i = chunk.rows.index((b, s))
            if text and i not in found.lost:
                found.warnings[i] = "; ".join(filter(None, (found.warnings.get(i), text)))
        drop = self.on_nonfinite == "drop"
        if self.solver.requires.ensemble:
            drop |= bool(weights[list(found.lost)].sum() < 0.5)
        for i, text in found.lost.items():
            if not drop:
                raise DivergenceError(text)
            self.progress.status[chunk.rows[i]] = f"dropped: {text}"
        for i, text in found.warnings.items():
            self.progress.warnings[chunk.rows[i]] = text

    def result(
        self,
        identity: Identity,
        num_samples: int,
        interrupted: bool,
        devices: list[str],
    ) -> Result:
        p = self.progress
        missing = "interrupted" if interrupted else "missing"
        status = [
            [p.status.get((b, s), missing) for s in range(num_samples)]
            for b in range(self.problem.num_measurements)
        ]
        count = max(1, len(p.status))
        manifest = {
            **identity.settings,
            **({"cannot_be_told_apart": identity.unknown} if identity.unknown else {}),
            "settings": self.solver.settings,
            "point_estimate": self.solver.point_estimate,
            "num_samples": num_samples,
            "seed": self.seed,
            "device": ", ".join(devices),
            "network_calls": p.counters[0],
            "vjp_calls": p.counters[1],
            "forward_calls": p.counters[2],
            "nfe": p.counters[0] / count,
            **self._inner_solves(),
            "seconds": round(p.seconds, 3),
            "chi2": p.chi2.tolist(),
            "status": status,
            "warnings": [text for _, text in sorted(p.warnings.items())],
            "forward_model": list(filter(None, (o.summary() for o in self.operators))),
            "versions": dict(versions()),
        }
        y = None if self.problem.likelihood is None else self.problem.likelihood.y.cpu()
        return Result(
            p.samples,
            p.chi2,
            p.log_prob,
            status,
            p.counters[0] / count,
            p.seconds,
            manifest,
            y,
            log_weights=p.log_weights,
        )

    def _inner_solves(self) -> dict[str, Any]:
        """What conjugate gradients did since the last start, for the manifest; warn where they did not finish."""
        parts = [part for part in self.shared.inner if part.solves]
        if not parts:
            return {}
        solves, iterations, unfinished = (
            sum(getattr(part, name) for part in parts)
            for name in ("solves", "iterations", "unfinished")
        )
        most = max(part.most for part in parts)
        if unfinished:
            warnings.warn(
                f"{unfinished} of {solves} inner solves of {type(self.solver).__name__} stopped after {most} "
                f"iterations, above the accuracy asked for: these data steps are not exact. An operator with `svd`, "
                f"`solve` or `preconditioner` of its own needs fewer"
            )
        found = {"solves": solves, "iterations": iterations, "most": most}
        return {"inner_solves": {**found, "unfinished": unfinished}}
