"""What is wrong with states and samples, in words: the rules of `divergence`, applied to a run by its driver."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from invguide.engine.divergence import (
    TOO_LARGE,
    Outcome,
    broken_rows,
    describe,
    judge,
    likely_cause,
    matters,
    size_limit,
)
from invguide.engine.fault import Fault, find_fault, kind, target_fault
from invguide.engine.run_state import SampleIndex
from invguide.errors import DivergenceError
from invguide.problem.problem import Problem
from invguide.problem.seen import Seen
from invguide.rng import Noise
from invguide.solver import EnsembleSolver, Solver

Bind = Callable[
    [list[SampleIndex]], tuple[Problem, Noise]
]  # problem and random numbers of some rows


@dataclass(frozen=True)
class Findings:
    """Texts by the index of their row; the rest is well."""

    lost: dict[int, str]
    warnings: dict[int, str]


@dataclass(frozen=True)
class Inspector:
    """Looks at the states of one solver on one problem.

    Attributes:
        solver: The solver.
        sigma_max: Largest noise level of the prior.
        bind: Makes the problem and the random numbers of any rows.
    """

    solver: Solver[Any]
    sigma_max: float
    bind: Bind

    def broken(
        self, state: Any, k: int, rows: Sequence[SampleIndex], begun: Any
    ) -> dict[int, str]:
        """Which rows of the state after step k (-1: init) are lost, and why: {index of the row: text}.

        Args:
            state: After the step.
            k: Of the step.
            rows: Of the state.
            begun: The state before the step; None where k is -1.
        """
        found: dict[int, str] = {}
        for i, name, peak in broken_rows(state, self.sigma_max):
            fault = None if math.isfinite(peak) else self._fault(i, rows, k, begun)
            (b, s), where = rows[i], self._at(k)
            found[i] = (
                f"{self._name} diverged: {name} of sample {s} of measurement {b} reached {peak:g} at {where}. "
                f"{likely_cause(self.solver)}"
                if fault is None
                else self._blame(fault, rows[i], k)
            )
        return found

    def explained(
        self, error: DivergenceError, rows: Sequence[SampleIndex], k: int, begun: Any
    ) -> DivergenceError:
        """Return the error that a solver raised in step k, with the fault behind it where there is one."""
        fault = self._fault(0, rows, k, begun)
        if fault is None or fault.impossible:
            return error
        return DivergenceError(f"{self._blame(fault, rows[0], k)} ({error})")

    def outcome(
        self,
        part: Problem,
        rows: Sequence[SampleIndex],
        x0: Tensor,
        log_prob: Tensor,
        chi2: Tensor,
        weights: Tensor,
    ) -> Findings:
        """Tell which finished samples are lost, and what is odd about others.

        Of an ensemble, members of next to no weight may be anywhere.

        Args:
            part: The problem of these rows.
            rows: Of the samples.
            x0: Samples, normalised units, (B, *shape).
            log_prob, chi2: At x0, (B,).
            weights: Of an ensemble, (B,), summing to 1.
        """
        rms = x0.square().flatten(1).mean(1).sqrt()
        numbers, wanted = x0[0].numel(), self.solver.requires.target != "none"
        size = self._size(part, rms, numbers)
        blank = torch.full_like(chi2, torch.nan), torch.full_like(chi2, torch.nan)
        large = not bool((rms < size_limit(size, numbers)).all())
        if wanted and (part.likelihood is not None or large):
            blank = _blank(part, rows, x0)
        outcome = Outcome(rms, chi2, log_prob, *blank)
        measured = 1 if part.likelihood is None else part.likelihood.y[0].numel()
        verdict = judge(outcome, size, numbers, measured, part.differentiable and wanted)
        lost = verdict.lost
        if isinstance(self.solver, EnsembleSolver):
            lost = matters(lost, weights)
        findings = Findings({}, {})
        for i, (b, s) in enumerate(rows):
            sample = f"sample {s} of measurement {b}"
            text = describe(outcome, verdict, i, size)
            if lost[i]:
                cause = likely_cause(self.solver)
                findings.lost[i] = f"{self._name} diverged: {sample} {text}. {cause}"
                continue
            if part.differentiable and not torch.isfinite(log_prob[i]):
                fault = target_fault(part.rows(torch.tensor([i])), x0[i : i + 1])
                text = " and ".join(filter(None, (text, fault and f"has no target: {fault.text}")))
            if text:
                findings.warnings[i] = f"{sample} {text}"
        return findings

    def unguided(
        self, part: Problem, rows: Sequence[SampleIndex], seen: Seen, log_prob: Tensor
    ) -> dict[int, str]:
        """Rows whose target was -inf or NaN whenever it was asked for, as it is at the end: nothing has guided them."""
        if self.solver.requires.target == "none":
            return {}
        return {
            i: f"{self._name} was not guided: {target_name(part)} gave {kind(log_prob[i])} at the end, and no finite "
            f"number for any of {seen.asked[b]} signals of measurement {b}; expected finite numbers for some, such as "
            f"a large negative one in place of -infinity where a rule is broken"
            for i, (b, _) in enumerate(rows)
            if not seen.finite.get(b) and not bool(log_prob[i].isfinite())
        }

    def _size(self, part: Problem, rms: Tensor, numbers: int) -> float:
        """Root mean square of clean signals, as told; where that looks wrong it is measured, and given up if it is."""
        told = part.prior.sigma_data
        if told is not None and bool((rms[torch.isfinite(rms)] < size_limit(told, numbers)).all()):
            return told
        measured = part.measured_size()
        return measured if told is None or measured > TOO_LARGE * told else told

    def _fault(self, i: int, rows: Sequence[SampleIndex], k: int, begun: Any) -> Fault | None:
        """What made row i so in step k; all members of an ensemble take the step again, else the one row."""
        one = not isinstance(self.solver, EnsembleSolver)
        part, noise = self.bind([rows[i]] if one else list(rows))
        if one and begun is not None:
            begun = type(begun)(*(t[i : i + 1] for t in begun))
        return find_fault(self.solver, part, begun, k, noise)

    def _blame(self, fault: Fault, row: SampleIndex, k: int) -> str:
        text = (
            f"{self._name} diverged: {fault.text} for sample {row[1]} of measurement {row[0]} at {self._at(k)}, "
            f"given a finite signal of rms {fault.rms:.3g}"
        )
        if fault.rms > self.sigma_max:  # it had gone astray before
            return f"{text}, far more than a clean one has. {likely_cause(self.solver)}"
        return f"{text}; {fault.remedy}"

    @property
    def _name(self) -> str:
        return type(self.solver).__name__

    def _at(self, k: int) -> str:
        return "init" if k < 0 else f"step {k + 1} of {self.solver.num_steps}"


def target_name(part: Problem) -> str:
    """The operator, the reward, or both."""
    names = [] if part.likelihood is None else [f"the operator {part.likelihood.operator!r}"]
    names += [] if part.reward is None else [f"the reward {part.reward!r}"]
    return " with ".join(" ".join(name.split()) for name in names)


def _blank(part: Problem, rows: Sequence[SampleIndex], x0: Tensor) -> tuple[Tensor, Tensor]:
    """chi2 and log target of a blank signal for each row, from one call for each measurement: they may be dear."""
    chi2, log_prob = x0.new_empty(len(rows)), x0.new_empty(len(rows))
    for b in {b for b, _ in rows}:
        own = torch.tensor([i for i, row in enumerate(rows) if row[0] == b])
        log_prob[own], chi2[own] = part.rows(own[:1]).evaluate(torch.zeros_like(x0[:1]))
    return chi2, log_prob
