"""The loop of one device: chunks of samples, step by step, with what may happen to them on the way."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from invguide.arguments.entries import unchecked
from invguide.engine.checkpoint import save_checkpoint
from invguide.engine.inspection import Inspector, target_name
from invguide.engine.run_identity import Identity
from invguide.engine.run_state import Chunk, Progress
from invguide.errors import DivergenceError
from invguide.numerics.linear import InnerSolves, counted_solves
from invguide.problem.data_size import SharedSize
from invguide.problem.problem import Counters, Problem
from invguide.problem.seen import Seen
from invguide.rng import Noise
from invguide.solver import EnsembleSolver, Solver
from invguide.system.devices import out_of_memory


class StepReport(NamedTuple):
    """What a callback gets after each step; `estimate()` is in data units, (rows, *shape)."""

    step: int
    num_steps: int
    rows: tuple[tuple[int, int], ...]
    info: NamedTuple
    estimate: Callable[[], Tensor]


@dataclass(frozen=True)
class RunSettings:
    """What does not change during a run."""

    solver: Solver[Any]
    seed: int
    dtype: torch.dtype
    on_nonfinite: str
    path: Path | None  # of the checkpoint
    checkpoint_every: int
    callbacks: Sequence[Callable[[StepReport], None]]
    num_devices: int
    patient: bool  # halves the batch where memory is short


@dataclass
class Shared:
    """What the loops of all devices have in common; whoever changes it holds the lock."""

    settings: RunSettings
    progress: Progress
    rows: list[tuple[int, int]]
    identity: Identity
    bar: Any
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
            if self.settings.path is None:
                return
            self.progress.data_size = self.size.value
            save_checkpoint(self.settings.path, self.identity, self.progress.content())


@dataclass
class Loop:
    """The loop of one device."""

    problem: Problem
    shared: Shared
    device: torch.device
    batch_size: int  # rows in one network call

    def __post_init__(self) -> None:
        self.settings = self.shared.settings
        self.solver = self.settings.solver
        self.progress = self.shared.progress
        self.problem.counters = Counters()
        self.inner = InnerSolves()
        self.shared.inner.append(self.inner)
        self.shared.counters.append(self.problem.counters)
        self.problem.batch_size = self.batch_size
        self.rows = min(self.batch_size, -(-len(self.shared.rows) // self.settings.num_devices))
        self.operators = self.problem.operators()
        self._guided = self.solver.requires.target != "none"
        self.inspector = Inspector(self.solver, self.problem.prior.sigma_max, self._bind)

    def run(self) -> None:
        """Take chunks until there are none."""
        ensemble = self.solver.ensemble_size if isinstance(self.solver, EnsembleSolver) else 0
        with torch.no_grad(), unchecked(), counted_solves(self.inner):
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
            if self.settings.path is not None:
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
            if not (self.settings.patient and self.batch_size > 1 and out_of_memory(error)):
                raise
        self.problem.counters.restore(counters)  # calls that count are those that led somewhere
        return None

    def _halve(self, chunk: Chunk) -> tuple[Problem, Noise]:
        """Go on with half of the batch; what is left of a chunk starts over later, with the same random numbers."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.problem.batch_size = self.batch_size = self.batch_size // 2
        if not isinstance(self.solver, EnsembleSolver) and len(chunk.rows) > 1:
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
        for callback in self.settings.callbacks:
            estimate = lambda s=chunk.state: self.problem.prior.to_data(solver.estimate(s))  # noqa: E731
            callback(StepReport(k, solver.num_steps, tuple(chunk.rows), info, estimate))
        if (
            self.settings.path is not None
            and chunk.step % self.settings.checkpoint_every == 0
            and chunk.step < solver.num_steps
        ):
            shared.save()

    def _bind(
        self, rows: list[tuple[int, int]], seen: Seen | None = None
    ) -> tuple[Problem, Noise]:
        index = torch.tensor([b for b, _ in rows], dtype=torch.long)
        noise = Noise(
            self.settings.seed, tuple(rows), self.problem.shape, self.settings.dtype, self.device
        )
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
        if isinstance(self.solver, EnsembleSolver) or self.settings.on_nonfinite == "raise":
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
        drop = self.settings.on_nonfinite == "drop"
        if isinstance(self.solver, EnsembleSolver):
            drop |= bool(weights[list(found.lost)].sum() < 0.5)
        for i, text in found.lost.items():
            if not drop:
                raise DivergenceError(text)
            self.progress.status[chunk.rows[i]] = f"dropped: {text}"
        for i, text in found.warnings.items():
            self.progress.warnings[chunk.rows[i]] = text


def run_all(loops: list[Loop], shared: Shared) -> bool:
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
