"""Promises of a solver's runs: states, inputs, seeds, rows and resuming."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from invguide import driver
from invguide.arguments.entries import unchecked
from invguide.engine.loop import StepReport
from invguide.engine.run_identity import FOLLOWED
from invguide.problem import Problem
from invguide.result import Result
from invguide.rng import Noise
from invguide.solver import EnsembleSolver, Solver
from invguide.testing.contract import difference, expect, same_bits
from invguide.testing.problems import started

Rows = list[tuple[int, int]]  # (measurement, sample)
ROUNDINGS = 50  # of the largest number of a state, in a step or network call: two dozen sums and products each


@dataclass(frozen=True)
class Look:
    """What can be seen between two steps; `before` is None after init."""

    part: Problem
    noise: Noise
    before: Any
    state: Any


@dataclass(frozen=True)
class Runs:
    """One solver on one problem."""

    solver: Solver[Any]
    problem: Problem
    device: torch.device

    @property
    def ensemble(self) -> bool:
        return isinstance(self.solver, EnsembleSolver)

    @property
    def rows(self) -> Rows:
        """All members of one ensemble, or six samples of all measurements (those of one: five)."""
        if isinstance(self.solver, EnsembleSolver):
            return [(0, s) for s in range(self.solver.ensemble_size)]
        return [(b, s) for b in range(self.problem.num_measurements) for s in range(self.count)]

    @property
    def count(self) -> int:
        return 3 if self.problem.num_measurements > 1 else 5

    def run(self, **more: Any) -> Result:
        settings = {"seed": 3, "dtype": torch.float64, "device": self.device, "progress": False}
        count = None if self.ensemble else self.count
        return driver.run(self.solver, self.problem, count, **(settings | more))

    def advance(
        self,
        rows: Rows,
        problem: Problem | None = None,
        dtype: torch.dtype = torch.float64,
        seed: int = 3,
        look: Callable[[Look], None] = lambda _: None,
    ) -> Tensor:
        """Carry rows to the end in one batch, and return the estimates, (len(rows), *shape), normalised units."""
        solver = self.solver
        laid = driver.lay_out(solver, problem or self.problem, None, self.device, dtype)
        index = torch.tensor([b for b, _ in rows])
        with torch.no_grad(), unchecked():
            part = laid.problem.rows(index)
            noise = Noise(seed, tuple(rows), part.shape, dtype, self.device)
            state = solver.init(part, noise)
            look(Look(part, noise, None, state))
            for k in range(solver.num_steps):
                before = state
                state, _ = solver.step(part, state, k, noise.at(k))
                look(Look(part, noise, before, state))
            return solver.estimate(state)

    # ---- promises

    def states(self) -> None:
        rows = self.rows
        for dtype in (torch.float64, torch.float32):

            def look(seen: Look, dtype: torch.dtype = dtype) -> None:
                expect(
                    isinstance(seen.state, self.solver.state_type),
                    f"a step returned a {type(seen.state).__name__}; expected the "
                    f"{self.solver.state_type.__name__} that the class names",
                )
                for name, t in seen.state._asdict().items():
                    expect(isinstance(t, Tensor), f"{name} is a {type(t).__name__}, not a tensor")
                    tensor_of_rows(name, t, len(rows), dtype, self.device)

            found = self.advance(rows, dtype=dtype, look=look)
            tensor_of_rows("estimate", found, len(rows), dtype, self.device)
            shape = (len(rows), *self.problem.shape)
            expect(
                found.dtype == dtype and tuple(found.shape) == shape,
                f"estimate is {found.dtype} {tuple(found.shape)}; expected {dtype} {shape}",
            )

    def inputs_unchanged(self) -> None:
        problems = [self.problem]
        if self.solver.warm_start:
            problems.append(started(self.problem))
        for problem in problems:
            kept: dict[str, Tensor] = {}
            state: dict[str, Tensor] = {}

            def look(seen: Look, kept: dict[str, Tensor] = kept) -> None:
                now = tensors_of(seen.part)
                if seen.before is None:
                    kept.update({name: t.clone() for name, t in now.items()})
                else:
                    for name, t in seen.before._asdict().items():
                        same = same_bits(t, state[name])  # noqa: B023
                        expect(same, f"step changes {name} of the state that it is given")
                for name, t in now.items():
                    expect(same_bits(t, kept[name]), f"it changes {name}, which is not its own")
                state.clear()  # noqa: B023
                state.update({n: t.clone() for n, t in seen.state._asdict().items()})  # noqa: B023

            begun = {name: t.clone() for name, t in tensors_of(problem).items()}
            self.advance(self.rows, problem, look=look)
            for name, t in tensors_of(problem).items():
                expect(same_bits(t.to(begun[name]), begun[name]), f"it changes {name}")

    def seed(self) -> None:
        rows = self.rows
        first = self.advance(rows)
        for draw in (torch.randn, np.random.standard_normal):
            draw(1)
        random.random()
        again = self.advance(rows)
        expect(
            same_bits(first, again),
            f"the same seed gives samples that differ by {difference(first, again):.3g}; expected the same bits: all "
            "random numbers come from `noise`",
        )
        if self.solver.point_estimate:
            return
        other = self.advance(rows, seed=4)
        moved = (first - other).flatten(1).abs().amax(1)
        expect(
            bool((moved > 0).all()),
            f"{int((moved == 0).sum())} of {len(rows)} samples are the same for another seed; expected all to differ, "
            "or point_estimate = True",
        )
        if not self.ensemble:
            own = [first[i] for i, (b, _) in enumerate(rows) if b == 0]
            expect(
                all(not torch.equal(own[0], x) for x in own[1:]),
                "two samples of one measurement and one seed are the same; expected others, or point_estimate = True",
            )

    def rows_independent(self) -> None:
        peak = 0.0
        rows = self.rows

        def look(seen: Look) -> None:
            nonlocal peak
            sizes = [float(t.abs().nan_to_num(0, 0, 0).max()) for t in seen.state if t.numel()]
            peak = max(peak, *sizes)

        whole = self.advance(rows, look=look)
        together = self.run(batch_size=64)
        bound = self.rounding(peak, together)
        scale = abs(self.problem.prior.scale) if self.problem.prior.affine else 1.0
        for size in (1, 2, 4) if not self.ensemble else (1, 5):
            off = difference(self.run(batch_size=size).samples, together.samples)
            what = "network batches" if self.ensemble else "chunks"
            expect(
                off <= scale * bound,
                f"in {what} of {size} samples are {off:.3g} off those in one batch; expected at most "
                f"{scale * bound:.3g}",
            )
        if self.ensemble:
            return
        order = list(range(1, len(rows), 2)) + list(range(0, len(rows), 2))[::-1]
        off = difference(self.advance([rows[i] for i in order]), whole[order])
        expect(
            off <= bound,
            f"in another order samples are {off:.3g} off; expected at most {bound:.3g}",
        )
        half = len(rows) // 2
        others = self.advance(rows[:half] + [(b, s + 100) for b, s in rows[half:]])
        off = difference(others[:half], whole[:half])
        expect(
            same_bits(others[:half], whole[:half]),
            f"beside other companions, in a batch of the same shape, samples are {off:.3g} off; expected the same bits",
        )

    def rounding(self, peak: float, run: Result) -> float:
        """What sums in another order may add up to: `ROUNDINGS` of the largest number, for each step and call."""
        kind = self.problem.prior.dtype
        eps = torch.finfo(kind if kind.is_floating_point else torch.float64).eps
        return ROUNDINGS * (self.solver.num_steps + run.nfe) * max(peak, 1.0) * eps / 2

    def resume(self) -> None:
        size = 4
        whole = self.run(batch_size=size)
        ensemble = self.ensemble
        chunks = self.problem.num_measurements if ensemble else -(-len(self.rows) // size)
        total = chunks * self.solver.num_steps
        for stop in sorted({max(1, total // 3), max(1, 2 * total // 3), total}):
            rest = self.resumed(stop, size)
            for name in ("samples", "chi2", "log_prob", "log_weights"):
                a, b = getattr(rest, name), getattr(whole, name)
                expect(
                    same_bits(a, b),
                    f"stopped after {stop} of {total} steps and gone on, {name} are {difference(a, b):.3g} off those "
                    "of a run in one go; expected the same bits: all that a step needs is in its state",
                )
            expect(
                rest.nfe == whole.nfe,
                f"stopped after {stop} of {total} steps, a sample costs {rest.nfe:g} network calls; expected "
                f"{whole.nfe:g}",
            )

    def resumed(self, stop: int, size: int) -> Result:
        """The run, interrupted after `stop` steps of all chunks and gone on from its checkpoint."""
        steps = 0

        def interrupt(_: StepReport) -> None:
            nonlocal steps
            steps += 1
            if steps == stop:
                raise KeyboardInterrupt

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "run.ckpt"
            more = {"batch_size": size, "checkpoint": path, "trust": tuple(FOLLOWED)}
            part = self.run(**more, callbacks=[interrupt])
            expect(not bool(part.finished.all()), "an interrupted run has finished all samples")
            self.run(seed=4, batch_size=size)  # nothing that is left from before is of use
            return self.run(**more)


def tensor_of_rows(
    name: str, t: Tensor, rows: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Raise Broken unless the tensor has that many rows and, of floating point, that type, on that device."""
    expect(
        t.ndim > 0 and len(t) == rows,
        f"{name} has the shape {tuple(t.shape)}; expected one row for each of {rows} samples",
    )
    expect(t.device.type == device.type, f"{name} is on {t.device}; expected {device}")
    expect(
        not t.is_floating_point() or t.dtype == dtype,
        f"{name} is {t.dtype} in a run of {dtype}; expected the type of the run",
    )


def tensors_of(problem: Problem) -> dict[str, Tensor]:
    """Return everything that a problem is made of, by name."""
    found = _tensors("prior", problem.prior)
    found |= {f"condition {name}": t for name, t in problem.condition.items()}
    if problem.start is not None:
        found["init"] = problem.start
    if problem.likelihood is not None:
        found["y"] = problem.likelihood.y
        found |= _tensors("noise", problem.likelihood.noise)
        found |= _tensors("operator", problem.likelihood.operator)
    if problem.reward is not None:
        found |= _tensors("reward", problem.reward)
    return found


def _tensors(name: str, thing: Any) -> dict[str, Tensor]:
    state: dict[str, Any] = dict(getattr(thing, "__dict__", {}))
    if isinstance(thing, nn.Module):
        state |= dict(thing.named_parameters()) | dict(thing.named_buffers())
    return {f"{name}.{key}": value for key, value in state.items() if isinstance(value, Tensor)}
