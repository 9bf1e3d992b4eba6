"""What a run leaves: its result, with a manifest that tells how it came about."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from invguide.engine.run_identity import versions
from invguide.numerics.linear import InnerSolves
from invguide.problem.problem import Problem
from invguide.result import Result

if TYPE_CHECKING:
    from invguide.engine.loop import Shared


def result_of(
    shared: Shared, problem: Problem, num_samples: int, interrupted: bool, devices: Sequence[str]
) -> Result:
    """The samples so far, with everything that was noted of them."""
    p, solver = shared.progress, shared.settings.solver
    missing = "interrupted" if interrupted else "missing"
    status = [
        [p.status.get((b, s), missing) for s in range(num_samples)]
        for b in range(problem.num_measurements)
    ]
    count = max(1, len(p.status))
    manifest = {
        **shared.identity.settings,
        **({"cannot_be_told_apart": shared.identity.unknown} if shared.identity.unknown else {}),
        "settings": solver.settings,
        "point_estimate": solver.point_estimate,
        "num_samples": num_samples,
        "seed": shared.settings.seed,
        "device": ", ".join(devices),
        "network_calls": p.counters[0],
        "vjp_calls": p.counters[1],
        "forward_calls": p.counters[2],
        "nfe": p.counters[0] / count,
        **inner_solves(shared.inner, type(solver).__name__),
        "seconds": round(p.seconds, 3),
        "chi2": p.chi2.tolist(),
        "status": status,
        "warnings": [text for _, text in sorted(p.warnings.items())],
        "forward_model": list(filter(None, (o.summary() for o in problem.operators()))),
        "versions": dict(versions()),
    }
    y = None if problem.likelihood is None else problem.likelihood.y.cpu()
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


def inner_solves(counts: Sequence[InnerSolves], solver: str) -> dict[str, Any]:
    """What conjugate gradients did since the last start, for the manifest; warn where they did not finish."""
    parts = [part for part in counts if part.solves]
    if not parts:
        return {}
    solves, iterations, unfinished = (
        sum(getattr(part, name) for part in parts)
        for name in ("solves", "iterations", "unfinished")
    )
    most = max(part.most for part in parts)
    if unfinished:
        warnings.warn(
            f"{unfinished} of {solves} inner solves of {solver} stopped after {most} "
            f"iterations, above the accuracy asked for: these data steps are not exact. An operator with `svd`, "
            f"`solve` or `preconditioner` of its own needs fewer"
        )
    found = {"solves": solves, "iterations": iterations, "most": most}
    return {"inner_solves": {**found, "unfinished": unfinished}}
