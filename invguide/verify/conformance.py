"""What `invguide verify` prints: both tables, of the solvers and targets that were asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from invguide.errors import InputError, suggest
from invguide.solver import Solver
from invguide.solvers.scg import SCG
from invguide.verify.black_box import black_box_targets
from invguide.verify.black_box_table import BlackBoxRow, is_black_box, verify_black_box
from invguide.verify.table import Row, Table, named, verify
from invguide.verify.targets import standard_targets


def conformance(
    solvers: Sequence[Solver[Any]],
    targets: Sequence[str] = (),
    num_samples: int = 2000,
    ensemble_size: int = 1000,
    seed: int = 0,
    *,
    device: str = "cpu",
) -> list[Table[Row] | Table[BlackBoxRow]]:
    """Compare solvers with exact laws.

    Args:
        solvers: Those that need no gradient go to the second table, or where a posterior is named, to both.
        targets: Names, of `standard_targets()` and `black_box_targets(large=True)`; none: all but the large ones.
        num_samples: Per solver and posterior.
        ensemble_size: Samples per solver and black-box target, in one run.
        seed: Of solvers and exact samples.
        device: Where the solvers run.

    Returns:
        The tables that have rows.

    Raises:
        InputError: Unknown target.
    """
    posteriors, hidden = standard_targets(), black_box_targets(large=bool(targets))
    known = [t.name for t in (*posteriors, *hidden)]
    for name in targets:
        if name not in known:
            raise InputError(f"unknown target {name!r}; {suggest(name, known)}")
    if targets:
        posteriors = tuple(t for t in posteriors if t.name in targets)
        hidden = tuple(t for t in hidden if t.name in targets)
    first = [s for s in solvers if targets or not is_black_box(s)]
    second = [s for s in solvers if is_black_box(s)]
    tables: list[Table[Row] | Table[BlackBoxRow]] = []
    if first and posteriors:
        tables.append(verify(first, posteriors, num_samples, seed, device=device))
    if second and hidden:
        tables.append(
            verify_black_box(_with_variants(second), hidden, ensemble_size, seed, device=device)
        )
    return tables


def _with_variants(solvers: Sequence[Solver[Any]]) -> dict[str, Solver[Any]]:
    """Return solvers under their names, and what measures otherwise with another setting, under both."""
    both = dict(named(solvers))
    for solver in solvers:
        if isinstance(solver, SCG):
            both["SCG softmax"] = replace(solver, select="softmax", num_draws=8)
    return both
