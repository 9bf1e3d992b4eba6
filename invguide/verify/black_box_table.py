"""The second conformance table: methods that only evaluate the target, on targets that are known exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from invguide import driver
from invguide.errors import DivergenceError, InputError
from invguide.solver import EnsembleSolver, Solver, missing_abilities
from invguide.system.progress import progress_bar
from invguide.verify.black_box import BlackBoxTarget, black_box_targets
from invguide.verify.table import Table, named


@dataclass(frozen=True)
class BlackBoxRow:
    """One solver on one black-box target; NaN where `note` says why there is no figure.

    Attributes:
        target, solver: Names; the solver "(exact)" is the floor and "(prior)" ignores the target.
        samples: How many, in one run: the size of an ensemble.
        metric, distance: To the exact law: TV, total variation of histograms, or SW1, sliced Wasserstein-1.
        floor: The same for exact samples, mean over four sets.
        log_target: Mean over the samples.
        expected: What it should be.
        nfe, calls: Network calls and evaluations of the target per sample.
        note: Why there are no figures, or how many samples were lost; else empty.
    """

    target: str
    solver: str
    samples: int = 0
    metric: str = ""
    distance: float = float("nan")
    floor: float = float("nan")
    log_target: float = float("nan")
    expected: float = float("nan")
    nfe: float = 0.0
    calls: float = 0.0
    note: str = ""

    HEAD: ClassVar = (
        *("target", "solver", "metric", "distance", "floor"),
        *("log target", "expected", "NFE", "calls", ""),
    )

    @property
    def cells(self) -> tuple[str, ...]:
        """One for each of HEAD."""
        if self.samples == 0:
            return self.target, self.solver, self.metric, *("-",) * 6, self.note
        return (
            self.target,
            self.solver,
            self.metric,
            f"{self.distance:.3f}",
            f"{self.floor:.3f}",
            f"{self.log_target:.2f}",
            f"{self.expected:.2f}",
            f"{self.nfe:.0f}",
            f"{self.calls:.0f}",
            self.note,
        )


def is_black_box(solver: Solver[Any]) -> bool:
    """Whether a solver does with values of the target."""
    needs = solver.requires
    return needs.target != "none" and not needs.gradient and not needs.linear


def verify_black_box(
    solvers: Mapping[str, Solver[Any]] | Sequence[Solver[Any]],
    targets: Sequence[BlackBoxTarget] | None = None,
    num_samples: int = 1000,
    seed: int = 0,
    *,
    device: str = "cpu",
    progress: bool = True,
) -> Table[BlackBoxRow]:
    """Compare solvers with exact laws of which they see values only.

    Args:
        solvers: Solvers under the names to print, or in a sequence (then named by their class).
        targets: `black_box_targets()` when left out.
        num_samples: Per solver and target, in one run: the size of every ensemble, whatever the solver says.
        seed: Of solvers and exact samples.
        device: Where the solvers run.
        progress: Show a progress bar once it has taken two seconds.

    Returns:
        For each target the rows "(exact)" and "(prior)", then one for each solver that can do with its values.
    """
    if num_samples < 2:
        raise InputError(f"num_samples must be at least 2, got {num_samples}.")
    solvers = {
        name: replace(solver, ensemble_size=num_samples)
        if isinstance(solver, EnsembleSolver)
        else solver  # pyright: ignore[reportCallIssue]
        for name, solver in named(solvers).items()
    }
    targets = black_box_targets() if targets is None else targets
    pairs = [
        (target, {n: s for n, s in solvers.items() if not missing_abilities(s.requires, problem)})
        for target in targets
        for problem in (target.problem(),)
    ]
    rows: list[BlackBoxRow] = []
    with progress_bar(sum(len(able) for _, able in pairs), "verify", progress) as bar:
        for target, able in pairs:
            rows.append(
                _score(target, "(exact)", target.sample(num_samples, seed + 1), None, seed)
            )
            prior_draws = getattr(target.prior, "sample", None)
            if prior_draws is not None:
                draws = target.prior.to_data(prior_draws(num_samples, seed + 1))
                rows.append(_score(target, "(prior)", draws, None, seed))
            for name, solver in able.items():
                rows.append(_run(target, name, solver, num_samples, seed, device))
                bar.update(1)
    return Table(tuple(rows))


def _run(
    target: BlackBoxTarget, name: str, solver: Solver[Any], count: int, seed: int, device: str
) -> BlackBoxRow:
    try:
        result = driver.run(
            solver,
            target.problem(),
            count,
            seed=seed,
            device=device,
            progress=False,
            on_nonfinite="drop",
        )
    except DivergenceError as error:
        return BlackBoxRow(target.name, name, metric=target.metric, note=f"diverged: {error}")
    finally:
        target.prior.to("cpu")
    kept = result.finished[0]
    lost = count - int(kept.sum())
    if count - lost < 2:
        note = f"diverged: {lost} of {count} samples lost"
        return BlackBoxRow(target.name, name, metric=target.metric, note=note)
    row = _score(target, name, result.samples[0, kept], result.weights[0, kept], seed)
    calls = (result.manifest["forward_calls"] - count) / count  # the driver's own look at the end
    note = f"{lost} of {count} samples lost" if lost else ""
    return replace(row, nfe=float(result.nfe), calls=calls, note=note)


def _score(
    target: BlackBoxTarget, name: str, samples: Tensor, weights: Tensor | None, seed: int
) -> BlackBoxRow:
    n = len(samples)
    weights = torch.full((n,), 1 / n) if weights is None else weights
    exact = [target.sample(n, seed + 10 + i) for i in range(4)]
    normalised = target.prior.to_normalised(samples)
    log_target = target.problem().repeat(n, 1).evaluate(normalised)[0]
    return BlackBoxRow(
        target=target.name,
        solver=name,
        samples=n,
        metric=target.metric,
        distance=target.distance(samples, weights, seed + 2),
        floor=sum(target.distance(x, torch.full((n,), 1 / n), seed + 2) for x in exact) / 4,
        log_target=float(torch.where(weights > 0, weights * log_target, 0.0).sum()),
        expected=target.expected,
    )
