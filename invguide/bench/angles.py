"""Does a sharper clean estimate guide better? Angles to the exact gradient, and what is left of them in the samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from invguide import driver
from invguide.adjoint.symplectic import guide_through
from invguide.errors import InputError
from invguide.priors import GaussianMixture
from invguide.problem.problem import Problem
from invguide.reward import as_reward
from invguide.solvers import SymplecticAdjoint
from invguide.system.progress import progress_bar
from invguide.system.tables import Table
from invguide.verify.distances import sliced_wasserstein
from invguide.verify.targets import MatrixOperator, Target, mixture_25

INNER_STEPS = (1, 2, 4, 8, 16)
LEVELS = (10.0, 3.0, 1.0)  # of noise, in standard deviations of the data
STEPS, CALLS = 50, 400


@dataclass(frozen=True, eq=False)
class KnownTarget:
    """A mixture prior and the mixture that it becomes: log p(y | x) and its gradient are known at every level.

    Attributes:
        prior, posterior: p(x) and p(x | y).
        make_problem: The problem of one measurement, or of a reward.
    """

    prior: GaussianMixture
    posterior: GaussianMixture
    make_problem: Callable[[], Problem]

    def exact_gradient(self, x: Tensor, a: float) -> Tensor:
        """Gradient of log p(y | x) for x at level a: the score of the posterior less that of the prior."""
        return (self.posterior.denoise(x, a) - self.prior.denoise(x, a)) / a**2


def class_target(seed: int = 0) -> KnownTarget:
    """One of ten classes with five narrow modes each, in 16 dimensions; reward: the exact log p(class | x0)."""
    source = torch.Generator().manual_seed(seed)
    means = torch.randn(50, 16, generator=source, dtype=torch.float64)
    covariance = 0.09 * torch.eye(16, dtype=torch.float64)
    prior, posterior = GaussianMixture(means, covariance), GaussianMixture(means[::10], covariance)

    def log_class(x: Tensor) -> Tensor:
        return posterior.log_prob(x) - prior.log_prob(x) - math.log(10)

    return KnownTarget(prior, posterior, lambda: Problem(prior, reward=as_reward(log_class)))


def mask_target(seed: int = 0) -> KnownTarget:
    """Four modes in 64 dimensions with variances 1 / k in a random basis; half of the coordinates are measured."""
    source = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, dtype=torch.float64)

    rotation = torch.linalg.qr(randn(64, 64)).Q
    std = torch.arange(1, 65, dtype=torch.float64) ** -0.5
    means = 3 * randn(4, 64) @ (rotation * std).mT
    prior = GaussianMixture(means, (rotation * std**2) @ rotation.mT)
    matrix = torch.eye(64, dtype=torch.float64)[:32]
    y = matrix @ (means[0] + rotation @ (std * randn(64))) + 0.05 * randn(32)
    posterior = prior.posterior(matrix, y, 0.05)
    target = Target("", prior, MatrixOperator(matrix), y[None], 0.05, posterior)
    return KnownTarget(prior, posterior, target.problem)


def modes_target(seed: int = 0) -> KnownTarget:
    """The 25 modes of `mixture_25`, in 8 dimensions, two random projections measured."""
    target = mixture_25(d=8, dy=2, seed=seed)
    prior, posterior = target.prior, target.posterior
    assert isinstance(prior, GaussianMixture)
    assert isinstance(posterior, GaussianMixture)
    return KnownTarget(prior, posterior, target.problem)


TARGETS = {"class": class_target, "half missing": mask_target, "25 modes": modes_target}


def measure_angles(
    targets: Sequence[KnownTarget],
    start: str,
    level: float,
    inner_steps: Sequence[int],
    points: int,
    seed: int = 0,
) -> dict[int, float]:
    """Mean angle in degrees between guidance and exact gradient, each point weighted by the length of the latter.

    Args:
        targets: The mean is over all of them.
        start: "prior" or "posterior": from which x0 are drawn, before noise is added.
        level: Noise level, in standard deviations of the data.
        inner_steps: For each of these.
        points: Of each target.
        seed: Of the points.
    """
    total, weights = dict.fromkeys(inner_steps, 0.0), 0.0
    for target in targets:
        problem = target.make_problem().repeat(points, 1)
        sigma = level * problem.sigma_data
        k = min(range(100), key=lambda i: abs(problem.levels("karras", 100, i)[0] - sigma))
        a = problem.levels("karras", 100, k)[0]
        clean = (target.prior if start == "prior" else target.posterior).sample(points, seed)
        source = torch.Generator().manual_seed(seed)
        x = clean + a * torch.randn(clean.shape, generator=source, dtype=clean.dtype)
        exact = target.exact_gradient(x, a)
        weight = exact.norm(dim=1)
        weights += float(weight.sum())
        for n in inner_steps:
            levels = SymplecticAdjoint(100, n).inner_levels(problem, k)
            found = guide_through(problem, x, levels)[1].gradient
            angle = torch.cosine_similarity(found, exact).clamp(-1, 1).arccos()
            total[n] += float((weight * torch.rad2deg(angle)).sum())
    return {n: angle / weights for n, angle in total.items()}


def steps_for(calls: int, n: int) -> int:
    """The most steps of a run with n inner steps that take no more network calls than this."""
    steps, spent = 0, 0
    while True:  # the run grows at its start: its last steps have fewer inner ones
        count = min(n, steps + 1)
        spent += 1 if count == 1 else 2 * count
        if spent > calls:
            return steps
        steps += 1


def measure_distance(
    targets: Sequence[KnownTarget], n: int, num_steps: int, samples: int, seed: int
) -> float:
    """Sliced Wasserstein-1 of samples with n inner steps to as many exact ones, mean over the targets."""
    total = 0.0
    for target in targets:
        result = driver.run(
            SymplecticAdjoint(num_steps, n),
            target.make_problem(),
            samples,
            seed=seed,
            batch_size=samples,
            progress=False,
            on_nonfinite="drop",
        )
        exact = target.posterior.sample(samples, seed + 1)
        total += sliced_wasserstein(result.samples[result.finished], exact, seed=seed)
    return total / len(targets)


def measure_floor(targets: Sequence[KnownTarget], samples: int, seed: int) -> float:
    """The same between two sets of exact samples."""
    pairs = ([t.posterior.sample(samples, seed + i) for i in (1, 2)] for t in targets)
    return sum(sliced_wasserstein(a, b, seed=seed) for a, b in pairs) / len(targets)


def guidance(
    *,
    instances: int = 10,
    points: int = 100,
    samples: int = 500,
    seed: int = 0,
    progress: bool = True,
) -> Table:
    """Compare guidance through n inner steps with the exact gradient of log p(y | x), on mixtures.

    Args:
        instances: Random mixtures of each kind.
        points: Of each, for the mean angles.
        samples: Of each, for the distances.
        seed: Of the first instance, points and samples.
        progress: Show a bar.

    Returns:
        Mean angles at several noise levels, and distances of samples at equal steps and at equal network calls.
    """
    if min(instances, points, samples) < 1:
        raise InputError(
            f"instances={instances}, points={points}, samples={samples}; expected at least 1 of each"
        )
    rows: list[tuple[str, ...]] = []
    found: dict[str, dict[int, float]] = {}

    def add(name: str, values: dict[int, float], form: str, exact: float) -> None:
        found[name] = values
        rows.append((name, *(format(values[n], form) for n in INNER_STEPS), format(exact, form)))

    budgets = {
        f"SW1, {STEPS} steps": dict.fromkeys(INNER_STEPS, STEPS),
        f"SW1, {CALLS} calls": {n: steps_for(CALLS, n) for n in INNER_STEPS},
    }
    total = len(TARGETS) * (2 * len(LEVELS) + len(budgets) * len(INNER_STEPS))
    with progress_bar(total, "guidance", progress) as bar:
        for kind, make in TARGETS.items():
            targets = [make(seed + i) for i in range(instances)]
            for start in ("prior", "posterior"):
                for level in LEVELS:
                    angles = measure_angles(targets, start, level, INNER_STEPS, points, seed)
                    add(f"{kind}: angle, {start}, noise {level:g}", angles, ".1f", 0.0)
                    bar.update(1)
            floor = measure_floor(targets, samples, seed)
            for name, budget in budgets.items():
                distances = {}
                for n, num_steps in budget.items():
                    distances[n] = measure_distance(targets, n, num_steps, samples, seed)
                    bar.update(1)
                add(f"{kind}: {name}", distances, ".3f", floor)
    counts = ", ".join(f"{steps_for(CALLS, n)} for n = {n}" for n in INNER_STEPS)
    notes = (
        "Angle: mean, in degrees, between the gradient that n inner steps give and the exact gradient of log p(y | x), "
        "weighted by the length of the latter; at x0 + noise, x0 from the prior (nothing decided yet) or from the "
        "posterior (where a perfect sampler is), noise in standard deviations of the data. n = 1 is DPS. SW1: sliced "
        f"Wasserstein-1 of {samples} samples of SymplecticAdjoint, all settings default, to exact ones; exact: between "
        f"two exact sets. All are means over {instances} random mixtures. Steps of {CALLS} network calls: {counts}.",
    )
    return Table(("inner steps n", *map(str, INNER_STEPS), "exact"), tuple(rows), notes, found)
