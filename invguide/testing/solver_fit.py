"""Promises of a solver about problems: what it refuses, what it takes, and what it does when told nothing."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from invguide import driver
from invguide.errors import CompatibilityError, InputError
from invguide.problem import Problem
from invguide.solver import EnsembleSolver, Solver
from invguide.testing.contract import Broken, difference, expect, same_bits, sample_moments
from invguide.testing.problems import Wrapped, blind_problem, correlated, default_problem, variants

DRAWS = 1000
# Of a spread: the variances that 100 ancestral steps carry from the first level to the last, in closed form, are 4.4 %
# (the long axis of `correlated`) to 5.4 % (the short one) of a spread too small.
SLACK = 0.06


@dataclass(frozen=True)
class Fit:
    """One solver among problems."""

    solver: Solver[Any]
    problem: Problem | None
    changes: dict[str, Any]  # of settings, for the control
    prior_draws: Tensor | None
    device: torch.device

    def run(self, solver: Solver[Any], problem: Problem, count: int) -> tuple[Tensor, int]:
        """Samples of the first measurement, normalised units, (count, *shape), and gradients of the prior."""
        result = driver.run(
            solver,
            problem,
            None if isinstance(solver, EnsembleSolver) else count,
            device=self.device,
            dtype=torch.float64,
            batch_size=max(count, 64),
            progress=False,
        )
        return problem.prior.to_normalised(result.samples[0]), result.manifest["vjp_calls"]

    def refusals(self) -> None:
        for variant in variants(self.solver):
            problem = variant.problem()
            try:
                samples, _ = self.run(self.solver, problem, 2)
            except CompatibilityError as error:
                expect(
                    variant.refused, f"{variant.name}: refused ({error}), and `requires` allows it"
                )
                calls = problem.counters.network
                expect(
                    calls == 0, f"{variant.name}: refused after {calls} network calls; expected 0"
                )
                continue
            except Exception as error:
                told = f"{type(error).__name__}: {error}"
                raise Broken(
                    f"{variant.name}: `requires` allows it, and the run ends in {told}"
                ) from error
            expect(not variant.refused, f"{variant.name}: `requires` rules it out, and it runs")
            expect(bool(samples.isfinite().all()), f"{variant.name}: samples are not finite")
        self._prior_gradient()

    def _prior_gradient(self) -> None:
        """Where `requires` says that the prior is not differentiated, one that cannot be gives the same samples."""
        needs = self.solver.requires
        if needs.prior_vjp or needs.closed_form or needs.reward is not None:
            return
        usual = default_problem(self.solver)
        blind = default_problem(self.solver)
        blind.prior = Wrapped(usual.prior, gradient=False)
        a, calls = self.run(self.solver, usual, 2)
        expect(
            calls == 0,
            f"prior_vjp is False in `requires`, and the prior is differentiated {calls} times",
        )
        b, _ = self.run(self.solver, blind, 2)
        expect(
            same_bits(a, b),
            f"with a prior that has no gradient samples are {difference(a, b):.3g} off; expected the same bits, as "
            "prior_vjp is False in `requires`",
        )

    def conditions(self) -> None:
        """For one label and another."""
        needs = self.solver.requires
        if needs.reward is not None or needs.counts:
            return
        usual, found = default_problem(self.solver), []
        for label in (0, 1):
            told = {"label": torch.tensor([label])}
            problem = Problem(usual.prior, usual.likelihood, usual.reward, condition=told)
            try:
                found.append(self.run(self.solver, problem, 2)[0])
            except CompatibilityError:
                continue
        expect(
            len(found) != 2 or not torch.equal(*found),
            "under two conditions of the prior samples are the same; expected others, as `problem.denoise` gives them, "
            "or a refusal",
        )

    def control(self) -> None:
        if self.solver.point_estimate:
            return
        solver, problem, clean = self._told_nothing()
        draws, _ = self.run(solver, problem, DRAWS)
        sample_moments("draws that are told nothing", draws, clean.to(draws), SLACK)

    def _told_nothing(self) -> tuple[Solver[Any], Problem, Tensor]:
        """The solver with steps enough, a problem that says nothing, and clean signals of its prior."""
        solver = self.solver
        own_levels = not isinstance(getattr(solver, "schedule", ""), str)
        usual: dict[str, Any] = {} if own_levels else {"num_steps": 100}
        if isinstance(solver, EnsembleSolver):
            usual["ensemble_size"] = DRAWS
        solver = dataclasses.replace(solver, **(usual | self.changes))
        if self.prior_draws is not None and self.problem is not None:
            return dataclasses.replace(solver, guidance_scale=0.0), self.problem, self.prior_draws
        if solver.requires.reward is not None:
            raise InputError(
                "the control needs prior_draws=..., clean signals of the problem's prior"
            )
        return solver, blind_problem(solver), correlated().sample(20 * DRAWS, seed=1)
