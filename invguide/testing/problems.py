"""Small problems in float64 with closed forms: on what solvers are checked where nothing else is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from invguide.errors import InputError
from invguide.forward_operator import LinearOperator, Operator
from invguide.likelihood import Likelihood
from invguide.noise import Laplace, Poisson
from invguide.operators import Identity
from invguide.prior import Prior
from invguide.priors import Gaussian, GaussianField, GaussianMixture
from invguide.problem import Problem
from invguide.reward import Reward, as_reward
from invguide.solver import Solver

EYE = torch.eye(2, dtype=torch.float64)
Y = torch.tensor([[0.3, 0.8], [-0.5, 0.1]], dtype=torch.float64)
SIGMA_Y = 0.3


def mixture() -> GaussianMixture:
    """Two clusters in the plane, which a label tells apart."""
    return GaussianMixture([[-1.0, 0.0], [1.0, 1.0]], 0.1 * EYE)


def correlated() -> Gaussian:
    return Gaussian([0.5, -0.3], [[1.0, 0.6], [0.6, 0.5]])


def waves(x: Tensor) -> Tensor:
    return x.flatten(1).sin().sum(1)


class Shear(LinearOperator):
    """A x = M x of two numbers; M is not orthonormal."""

    matrix: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.tensor([[1.0, 0.5], [0.0, 2.0]], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.mT.to(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return y @ self.matrix.to(y)

    def input_shape(self, y_shape: tuple[int, ...]) -> tuple[int, ...]:
        return y_shape


class Bent(Operator):
    """x + sin(x) / 2 of every number: not linear, with a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * x.sin()

    def input_shape(self, y_shape: tuple[int, ...]) -> tuple[int, ...]:
        return y_shape


class Hidden(Bent):
    """The same through numpy: refuses to be differentiated, as a simulator does."""

    differentiable = False

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            raise RuntimeError("this operator was to be differentiated")
        return torch.from_numpy(super().forward(x).numpy().copy())


class HiddenLinear(Identity):
    """The identity through numpy."""

    differentiable = False

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            raise RuntimeError("this operator was to be differentiated")
        return torch.from_numpy(x.numpy().copy())


class Wrapped(Prior):
    """A prior of which nothing is known but its denoiser."""

    def __init__(self, prior: Prior, gradient: bool = True) -> None:
        super().__init__()
        self.inner, self.gradient = prior, gradient
        self.shape, self.sigma_min, self.sigma_max = prior.shape, prior.sigma_min, prior.sigma_max
        self.scale, self.shift, self.sigma_data = prior.scale, prior.shift, prior.sigma_data
        self.symmetric = prior.symmetric

    def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
        if self.gradient:
            return self.inner.denoise(x, sigma, **condition)
        if x.requires_grad:
            raise RuntimeError("this prior was to be differentiated")
        return self.inner.denoise(x, sigma, **condition)


def default_problem(solver: Solver[Any]) -> Problem:
    """Return a problem that the solver takes, of two measurements where it takes any.

    Raises:
        InputError: It needs a kind of reward that only its user has.
    """
    requires = solver.requires
    if requires.reward is not None:
        raise InputError(
            f"{type(solver).__name__} needs a reward of the kind {requires.reward.__name__}; give problem=..."
        )
    if requires.counts:
        return counted()
    if requires.target == "reward":
        return Problem(mixture(), reward=as_reward(waves))
    # A label for one measurement, none for the other; what has a closed form is that without labels.
    condition = None if requires.closed_form else {"label": torch.tensor([-1, 1])}
    operator = Identity() if requires.orthonormal else Shear()
    sigma_y = torch.tensor([[0.3], [0.5]], dtype=torch.float64)
    return Problem(mixture(), Likelihood(operator, Y, sigma_y), condition=condition)


def started(problem: Problem) -> Problem:
    """The same problem, from given signals."""
    prior, like = problem.prior, problem.like
    source = torch.Generator().manual_seed(0)
    size = 1.0 if prior.sigma_data is None else prior.sigma_data
    shape = (problem.num_measurements, *problem.shape)
    x0 = size * torch.randn(shape, generator=source, dtype=torch.float64).to(like)
    return Problem(
        prior,
        problem.likelihood,
        problem.reward,
        shape=problem.data_shape,
        condition=problem.condition or None,
        init=prior.to_data(x0),
        init_noise=float(size * abs(prior.scale)),
    )


def counted() -> Problem:
    """Two pictures of 4 x 4 counts."""
    prior = GaussianField((1, 4, 4), std=0.5, scale=0.2, shift=0.5)
    prior.symmetric = True  # as it is: the spectrum knows no direction
    rate = prior.to_data(prior.sample(2, seed=1)).clamp_min(0.05)
    source = torch.Generator().manual_seed(0)
    return Problem(
        prior, Likelihood(Identity(), 0.05 * torch.poisson(rate / 0.05, source), Poisson(0.05))
    )


def blind_problem(solver: Solver[Any]) -> Problem:
    """A problem that tells nothing: noise of a million spreads, or a reward that is the same everywhere."""
    if solver.requires.target == "reward":
        return Problem(correlated(), reward=as_reward(lambda x: 0 * x.flatten(1).sum(1)))
    return Problem(correlated(), Likelihood(Identity(), torch.zeros(1, 2).double(), 1e6))


class Variant(NamedTuple):
    """A problem that lacks something, and whether `requires` says that it is refused."""

    name: str
    problem: Callable[[], Problem]
    refused: bool


def variants(solver: Solver[Any]) -> list[Variant]:
    """Problems that each lack one ability, of those that a solver may ask for."""
    needs, target = solver.requires, solver.requires.target
    special = needs.reward is not None or needs.counts  # none of these problems is for it
    guided, measuring = target != "none", target == "likelihood"
    pull = as_reward(waves)
    found = [
        Variant("no measurement and no reward", lambda: Problem(mixture()), guided),
        Variant(
            "a reward in place of a measurement",
            lambda: Problem(mixture(), reward=pull),
            measuring or special,
        ),
        Variant(
            "a reward beside a measurement",
            lambda: _measured(Identity(), reward=pull),
            measuring or special,
        ),
        Variant(
            "a measurement in place of a reward",
            lambda: _measured(Identity()),
            target == "reward" or special,
        ),
        Variant(
            "a reward without a gradient",
            lambda: Problem(mixture(), reward=as_reward(waves, False)),
            guided and (measuring or special or needs.gradient),
        ),
    ]
    if target != "reward":
        found += _of_measurements(solver, guided)
    if not special:
        start = {"init": Y[:1] + 0.2, "init_noise": 0.7}
        likelihood = None if target == "reward" else Likelihood(Identity(), Y[:1], SIGMA_Y)
        reward = pull if target == "reward" else None
        found.append(
            Variant(
                "signals to start from",
                lambda: Problem(mixture(), likelihood, reward, **start),
                not solver.warm_start,
            )
        )
    return found


def _of_measurements(solver: Solver[Any], guided: bool) -> list[Variant]:
    needs = solver.requires
    linear = guided and (needs.linear or needs.counts)
    gaussian = guided and (needs.gaussian or needs.counts)
    return [
        Variant("an operator that is not linear", lambda: _measured(Bent()), linear),
        Variant(
            "an operator that is not orthonormal",
            lambda: _measured(Shear()),
            needs.orthonormal or needs.counts,
        ),
        Variant(
            "a black box",
            lambda: _measured(HiddenLinear() if linear else Hidden()),
            guided and (needs.gradient or needs.counts),
        ),
        Variant(
            "noise that is not Gaussian",
            lambda: _measured(Identity(), noise=Laplace(0.3)),
            gaussian,
        ),
        Variant(
            "a log density of its own as noise",
            lambda: _measured(Identity(), noise=lambda p, y: -((p - y) ** 2).sum(1)),
            gaussian or (guided and needs.residuals),
        ),
        Variant(
            "a prior without a closed form",
            lambda: _measured(Identity(), prior=Wrapped(mixture())),
            needs.closed_form or needs.counts,
        ),
    ]


def _measured(
    operator: Operator,
    noise: Any = SIGMA_Y,
    prior: Prior | None = None,
    reward: Reward | None = None,
) -> Problem:
    return Problem(prior or mixture(), Likelihood(operator, Y, noise), reward)
