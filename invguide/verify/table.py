"""The conformance table: every solver on every target, next to what exact samples would score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from invguide import driver
from invguide.errors import CompatibilityError, DivergenceError, InputError
from invguide.solver import EnsembleSolver, Solver
from invguide.system.progress import progress_bar
from invguide.system.tables import markdown
from invguide.verify.distances import mean_error, sliced_wasserstein, std_ratio, unweighted
from invguide.verify.targets import Target, standard_targets


@dataclass(frozen=True)
class Row:
    """One solver on one target; NaN where `note` says why there is no figure.

    Attributes:
        target, solver: Names; the solver "(exact)" is the floor and "(prior)" ignores y.
        samples: How many the figures are from.
        mean_error: Rms over entries of the error of the mean, in posterior standard deviations.
        std_ratio: Sample over exact standard deviation, geometric mean over entries.
        std_low, std_high: Its extremes over entries.
        distance: Sliced Wasserstein-1 to as many exact samples, data units, mean over four sets.
        floor: The same between two sets of exact samples.
        nfe: Network calls per sample.
        note: Why there are no figures, or how many samples were lost; else empty.
    """

    target: str
    solver: str
    samples: int = 0
    mean_error: float = float("nan")
    std_ratio: float = float("nan")
    std_low: float = float("nan")
    std_high: float = float("nan")
    distance: float = float("nan")
    floor: float = float("nan")
    nfe: float = 0.0
    note: str = ""

    HEAD: ClassVar = (
        *("target", "solver", "mean error", "std ratio", "(range)"),
        *("SW1", "floor", "NFE", ""),
    )

    @property
    def cells(self) -> tuple[str, ...]:
        """One for each of HEAD."""
        if self.samples == 0:
            return self.target, self.solver, *("-",) * 6, self.note
        return (
            self.target,
            self.solver,
            f"{self.mean_error:.3f}",
            f"{self.std_ratio:.3f}",
            f"{self.std_low:.2f}-{self.std_high:.2f}",
            f"{self.distance:.4f}",
            f"{self.floor:.4f}",
            f"{self.nfe:.0f}",
            self.note,
        )


class Printable(Protocol):
    """A row of a table."""

    HEAD: ClassVar[tuple[str, ...]]

    @property
    def target(self) -> str: ...
    @property
    def solver(self) -> str: ...
    @property
    def cells(self) -> tuple[str, ...]: ...


AnyRow = TypeVar("AnyRow", bound=Printable)


@dataclass(frozen=True)
class Table(Generic[AnyRow]):
    """Rows, printed as an aligned Markdown table."""

    rows: tuple[AnyRow, ...]

    def row(self, solver: str, target: str) -> AnyRow:
        """Return the row of a solver on a target.

        Raises:
            InputError: If there is none.
        """
        for row in self.rows:
            if (row.solver, row.target) == (solver, target):
                return row
        raise InputError(f"The table has no row for solver {solver!r} on target {target!r}.")

    def __str__(self) -> str:
        if not self.rows:
            return ""
        head = self.rows[0].HEAD
        return markdown(head, [row.cells for row in self.rows], left=(0, 1, len(head) - 1))


def verify(
    solvers: Mapping[str, Solver[Any]] | Sequence[Solver[Any]],
    targets: Sequence[Target] | None = None,
    num_samples: int = 2000,
    seed: int = 0,
    *,
    device: str = "cpu",
    progress: bool = True,
) -> Table[Row]:
    """Compare solvers with exact posteriors.

    An ensemble method is run as often as it takes to pool num_samples samples, so that its bias is
    not hidden behind the scatter of one small ensemble; samples with weights are resampled by them.
    A solver that refuses a target or diverges on it gets a row that says so, and the table goes on.

    Args:
        solvers: Solvers under the names to print, or in a sequence (then named by their class).
        targets: `standard_targets()` when left out.
        num_samples: Per solver and target.
        seed: Of solvers, exact samples and projections.
        device: Where the solvers run.
        progress: Show a progress bar once it has taken two seconds.

    Returns:
        For each target the rows "(exact)" and "(prior)", then one for each solver.
    """
    if num_samples < 2:
        raise InputError(f"num_samples must be at least 2, got {num_samples}.")
    solvers = named(solvers)
    targets = standard_targets() if targets is None else targets
    rows: list[Row] = []
    with progress_bar(len(targets) * len(solvers), "verify", progress) as bar:
        for target in targets:
            prior_draws = getattr(target.prior, "sample", None)
            rows.append(_score(target, "(exact)", _exact(target, num_samples, seed + 1), seed))
            if prior_draws is not None:
                draws = target.prior.to_data(prior_draws(num_samples, seed + 1))
                rows.append(_score(target, "(prior)", draws, seed))
            for name, solver in solvers.items():
                rows.append(_run(target, name, solver, num_samples, seed, device))
                bar.update(1)
    return Table(tuple(rows))


def named(solvers: Mapping[str, Solver[Any]] | Sequence[Solver[Any]]) -> Mapping[str, Solver[Any]]:
    """Return solvers under their names; those of a sequence are named by their class.

    Raises:
        InputError: If two have the same name.
    """
    if isinstance(solvers, Mapping):
        return solvers
    names = [type(solver).__name__ for solver in solvers]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise InputError(f"Two solvers are named {repeated.pop()!r}: pass a dict of names.")
    return dict(zip(names, solvers, strict=True))


def _run(
    target: Target, name: str, solver: Solver[Any], num_samples: int, seed: int, device: str
) -> Row:
    count, copies = num_samples, 1
    if isinstance(solver, EnsembleSolver):
        count = solver.ensemble_size if isinstance(solver, EnsembleSolver) else num_samples
        copies = -(-num_samples // count)
    try:
        result = driver.run(
            solver,
            target.problem(copies),
            num_samples=count,
            seed=seed,
            device=device,
            progress=False,
            on_nonfinite="drop",
        )
    except CompatibilityError as error:
        return Row(target.name, name, note=f"does not apply: {error}")
    except DivergenceError as error:
        return Row(target.name, name, note=f"diverged: {error}")
    finally:
        target.prior.to("cpu")
    pairs = zip(result.samples, result.weights, result.finished, strict=True)
    samples = torch.cat([unweighted(x[ok], w[ok]) for x, w, ok in pairs])
    lost = count * copies - len(samples)
    if len(samples) < 2:
        return Row(target.name, name, note=f"diverged: {lost} of {count * copies} samples lost")
    note = f"{lost} of {count * copies} samples lost" if lost else ""
    return _score(target, name, samples, seed, float(result.nfe), note)


def _exact(target: Target, n: int, seed: int) -> Tensor:
    return target.prior.to_data(target.posterior.sample(n, seed))


def _score(
    target: Target, name: str, samples: Tensor, seed: int, nfe: float = 0.0, note: str = ""
) -> Row:
    """Fill one row; distance and floor are means over four independent sets of exact samples."""
    n, law = len(samples), target.posterior
    references = [_exact(target, n, seed + 2 + i) for i in range(4)]
    samples = samples.to(references[0])
    std = law.std * abs(target.prior.scale)
    ratio, low, high = std_ratio(samples, std)

    def distance(a: Tensor, b: Tensor) -> float:
        return sliced_wasserstein(a, b, seed=seed)

    pairs = zip(references, references[1:] + references[:1], strict=True)
    return Row(
        target=target.name,
        solver=name,
        samples=n,
        mean_error=mean_error(samples, target.prior.to_data(law.mean), std),
        std_ratio=ratio,
        std_low=low,
        std_high=high,
        distance=sum(distance(samples, reference) for reference in references) / 4,
        floor=sum(distance(a, b) for a, b in pairs) / 4,
        nfe=nfe,
        note=note,
    )
