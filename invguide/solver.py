"""The Solver contract: a value that holds hyper-parameters, with pure `init` and `step`."""

from __future__ import annotations

import dataclasses
import typing
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from torch import Tensor

from invguide.arguments.checks import Checked
from invguide.arguments.rules import Count
from invguide.errors import CompatibilityError, InputError
from invguide.problem.problem import Problem
from invguide.reward import Reward, terms
from invguide.rng import Noise

State = TypeVar("State")


@dataclass(frozen=True)
class Requires:
    """What a solver needs of a problem; the driver checks it before the first network call.

    Attributes:
        target: "likelihood", "reward", "either", or "none" (the target is ignored).
        reward: A kind of reward that has to be among the terms of the target.
        gradient: Differentiates the operator or reward.
        linear: Needs a linear operator.
        residuals: Counts residuals in standard deviations of the noise, which a log density of one's own does not tell.
        prior_vjp: Differentiates the prior (memory of one network graph).
        gaussian: Needs Gaussian noise, of any covariance.
        orthonormal: Needs an operator with A* A = A A* = I, one sigma_y per measurement, and a prior valid at it.
        counts: Needs a picture that was counted itself: Poisson or PoissonGaussian noise of one gain, A x = c x.
        closed_form: Needs a prior with a `posterior` of its own, under no condition.
        weighs: It weighs its members by the whole measurement: where that has more numbers than there are members, next
            to none of them would be left. "auto" looks at this.
    """

    target: str = "likelihood"
    reward: type[Reward] | None = None
    gradient: bool = True
    linear: bool = False
    residuals: bool = False
    prior_vjp: bool = False
    gaussian: bool = False
    orthonormal: bool = False
    counts: bool = False
    closed_form: bool = False
    weighs: bool = False


@dataclass(frozen=True)
class Solver(Generic[State], metaclass=Checked):
    """Base of every solver. Subclasses are frozen dataclasses; `State` is a NamedTuple of tensors (B, ...)."""

    requires: ClassVar[Requires]
    # One answer, not samples: seeds agree or nearly so, their spread tells nothing, and `Result.std` is NaN.
    point_estimate: ClassVar[bool] = False
    # Whether it begins at `problem.begin(...)`, and so from signals that the user gives with their noise level.
    warm_start: ClassVar[bool] = False
    registry: ClassVar[dict[str, type[Solver[Any]]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        known = Solver.registry.get(cls.__name__)
        # A class of the same name elsewhere does not take the place of ours.
        if "requires" in cls.__dict__ and (known is None or _is_ours(cls) or not _is_ours(known)):
            Solver.registry[cls.__name__] = cls

    num_steps: Count = 100

    @abstractmethod
    def init(self, problem: Problem, noise: Noise) -> State:
        """Return the state before step 0."""

    @abstractmethod
    def step(
        self, problem: Problem, state: State, k: int, noise: Noise
    ) -> tuple[State, NamedTuple]:
        """Return the state after step k = 0 ... num_steps - 1, and an Info worth looking at."""

    @abstractmethod
    def estimate(self, state: State) -> Tensor:
        """Return the clean signals (B, *shape), normalised units; valid after any step."""

    def log_weights(self, state: State) -> Tensor | None:
        """Return unnormalised log-weights (B,) of the samples of one measurement; None: all weigh the same."""
        return None

    @property
    def settings(self) -> dict[str, Any]:
        return {"solver": type(self).__name__, **dataclasses.asdict(self)}

    @property
    def state_type(self) -> type[State]:
        """The NamedTuple named in `class MySolver(Solver[MyState])`; a checkpoint is rebuilt with it."""
        for base in getattr(type(self), "__orig_bases__", ()):
            if issubclass(typing.get_origin(base) or object, Solver):
                return typing.get_args(base)[0]
        raise TypeError(
            f"{type(self).__name__} must name its state: class {type(self).__name__}(Solver[MyState])"
        )


@dataclass(frozen=True)
class EnsembleSolver(Solver[State]):
    """Base of methods whose samples of one measurement interact: the whole ensemble is the result.

    All rows that `step` sees belong to one measurement, and there are `ensemble_size` of them.
    """

    ensemble_size: Count = 128


def _is_ours(kind: type) -> bool:
    return kind.__module__.startswith("invguide.")


def sample_count(solver: Solver[Any], num_samples: int | None) -> int:
    """Return how many samples a run draws: num_samples, by default 1, or the size of the ensemble.

    Raises:
        InputError: num_samples is below 1, or not the ensemble's size.
    """
    if num_samples is not None and num_samples < 1:
        raise InputError(f"num_samples={num_samples}; expected at least 1")
    if not isinstance(solver, EnsembleSolver):
        return num_samples or 1
    size = solver.ensemble_size
    if num_samples not in (None, size):
        raise InputError(
            f"num_samples={num_samples} and {type(solver).__name__}(ensemble_size={size}) disagree: the samples are "
            f"the ensemble; leave num_samples out, or give {type(solver).__name__}(ensemble_size={num_samples})"
        )
    return size


def missing_abilities(requires: Requires, problem: Problem) -> list[str]:
    """Return what the solver needs and the problem lacks, as phrases; empty where they fit."""
    missing: list[str] = []
    if requires.target == "likelihood" and problem.likelihood is None:
        missing.append(
            "needs a measurement (y and an operator), and this problem has a reward only"
        )
    if requires.target == "likelihood" and problem.reward is not None:
        missing.append("takes a measurement only, and would ignore the reward")
    if requires.target == "reward" and problem.reward is None:
        missing.append("needs a reward, and this problem has a measurement only")
    elif requires.reward is not None and not problem.rewards(requires.reward):
        kind = requires.reward.__name__
        missing.append(f"needs a reward of the kind {kind}, and {problem.reward!r} is none")
    if requires.target == "either" and problem.likelihood is None and problem.reward is None:
        missing.append("needs a measurement or a reward")
    if requires.target != "none" and requires.gradient and not problem.differentiable:
        missing.append(f"differentiates the operator or reward, and {_black_box(problem)}")
    if requires.linear and not problem.linear:
        missing.append("needs a linear operator")
    if requires.gaussian and not problem.gaussian:
        missing.append(
            "needs Gaussian noise (Gaussian, CorrelatedGaussian, BlockGaussian, LowRankGaussian)"
        )
    elif requires.linear and problem.linear:
        if requires.orthonormal and not problem.denoises:
            missing.append(
                "needs the measurement to be the signal itself, or an orthonormal transform of it, with one sigma_y "
                f"of at most {problem.prior.sigma_max * problem.prior.scale:g}"
            )
        if requires.closed_form and not problem.closed_form:
            missing.append(
                "needs a prior whose posterior is known in closed form (a Gaussian, a mixture), and no condition"
            )
    if requires.counts and problem.linear and problem.counts is None:
        missing.append(
            "needs counts of a picture itself: Poisson or PoissonGaussian noise with one gain per measurement, no "
            "pixel missing, and a prior of pictures (`symmetric`)"
        )
    if requires.residuals and problem.likelihood is not None and not problem.has_residuals:
        missing.append(
            f"needs the standard deviation of the noise, and {type(problem.likelihood.noise).__name__} tells none"
        )
    return missing


def _black_box(problem: Problem) -> str:
    """Say which part of the target has no gradient, and why where that is known."""
    likelihood, reward = problem.likelihood, problem.reward
    if likelihood is not None and not likelihood.differentiable:
        part, fault = type(likelihood.operator).__name__, likelihood.fault
    else:
        blind = [part for _, part in terms(reward) if not part.differentiable] if reward else []
        part = repr(blind[0]) if blind else type(reward).__name__
        fault = getattr(blind[0], "fault", None) if blind else None
    why = "" if fault is None else f": {fault} (`check` shows it)"
    return f"{part} is a black box{why}"


def misfits(solver: Solver[Any] | type[Solver[Any]], problem: Problem) -> list[str]:
    """Return why the solver cannot run on the problem, as phrases; empty where they fit."""
    missing = missing_abilities(solver.requires, problem)
    if problem.start is not None and not solver.warm_start:
        missing.append("cannot start from signals that are given (init)")
    return missing


def check_compatible(solver: Solver[Any], problem: Problem) -> None:
    """Raise CompatibilityError, naming the solvers that would do, unless solver and problem fit."""
    missing = misfits(solver, problem)
    if not missing:
        return
    able = [
        name
        for name, kind in sorted(Solver.registry.items())
        if kind.requires.target != "none" and not misfits(kind, problem)
    ]
    advice = f"solvers that would do: {', '.join(able)}" if able else "no solver at hand would do"
    raise CompatibilityError(f"{type(solver).__name__} {'; it '.join(missing)}. {advice}")
