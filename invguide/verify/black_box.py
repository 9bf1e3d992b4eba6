"""Targets for methods that only evaluate: rewards on the plane and posteriors whose operator is hidden."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property

import torch
from torch import Tensor

from invguide.forward_operator import Operator
from invguide.likelihood import Likelihood
from invguide.prior import Prior
from invguide.priors import GaussianMixture
from invguide.problem.problem import Problem
from invguide.reward import Reward
from invguide.verify.distances import sliced_wasserstein, unweighted
from invguide.verify.rewards import Checkerboard, Indicator, Staircase
from invguide.verify.targets import Target, mixture_25


class BlackBoxTarget(ABC):
    """A density known exactly, of which a solver sees the prior and values of the log target; data units.

    Attributes:
        name: As printed in tables.
        metric: Name of the distance.
        prior: A closed-form prior.
    """

    name: str
    metric: str
    prior: Prior

    @property
    @abstractmethod
    def expected(self) -> float:
        """Mean of the log target, up to the constant that `Problem.evaluate` leaves out."""

    @abstractmethod
    def problem(self) -> Problem:
        """Return the problem for the driver."""

    @abstractmethod
    def sample(self, n: int, seed: int) -> Tensor:
        """Draw n exact samples."""

    @abstractmethod
    def distance(self, samples: Tensor, weights: Tensor, seed: int) -> float:
        """Distance of samples (n, *shape), whose weights (n,) sum to 1, to the exact law."""


class TiltedPlane(BlackBoxTarget):
    """p(x) exp(r(x)) on the plane by quadrature; total variation between histograms on a fixed grid of cells.

    Args:
        name: As printed in tables.
        prior: On the plane, scale 1.
        reward: Constant between jumps; those along edges of cells cost the quadrature nothing.
        edge: The grid covers [-edge, edge]^2; what lies outside is one more cell.
        cells: Per side.
        points: Of the quadrature, per side of a cell.
    """

    metric = "TV"

    def __init__(
        self,
        name: str,
        prior: GaussianMixture,
        reward: Reward,
        edge: float = 6.0,
        cells: int = 12,
        points: int = 50,
    ) -> None:
        self.name, self.prior, self.reward = name, prior, reward
        self.edge, self.cells = edge, cells
        self.spacing = 2 * edge / (cells * points)
        axis = (torch.arange(cells * points).double() + 0.5) * self.spacing - edge
        self.grid = torch.cartesian_prod(axis, axis)
        self.rewards = reward(self.grid)
        self.law = (prior.log_prob(self.grid) + self.rewards).softmax(0)

    @property
    def expected(self) -> float:
        return float(self.law @ self.rewards)

    def problem(self) -> Problem:
        return Problem(self.prior, reward=self.reward)

    def sample(self, n: int, seed: int) -> Tensor:
        source = torch.Generator().manual_seed(seed)
        chosen = torch.multinomial(self.law, n, replacement=True, generator=source)
        jitter = torch.rand(n, 2, generator=source, dtype=self.grid.dtype) - 0.5
        return self.grid[chosen] + self.spacing * jitter

    def distance(self, samples: Tensor, weights: Tensor, seed: int = 0) -> float:
        return float((self._histogram(samples, weights) - self._exact).abs().sum() / 2)

    @cached_property
    def _exact(self) -> Tensor:
        return self._histogram(self.grid, self.law)

    def _histogram(self, samples: Tensor, weights: Tensor) -> Tensor:
        """Mass of each cell, and of what lies outside, (cells^2 + 1,)."""
        at = ((samples.double() + self.edge) * (self.cells / (2 * self.edge))).floor().long()
        inside = ((at >= 0) & (at < self.cells)).all(1)
        cell = torch.where(inside, at[:, 0] * self.cells + at[:, 1], self.cells**2)
        return torch.bincount(cell, weights.double(), minlength=self.cells**2 + 1)


class Hidden(Operator):
    """An operator of which only the values are left: no gradient, no adjoint, nothing known to be linear."""

    differentiable = False

    def __init__(self, operator: Operator) -> None:
        super().__init__()
        self.operator = operator

    def forward(self, x: Tensor) -> Tensor:
        return self.operator(x.detach())

    def input_shape(self, y_shape: tuple[int, ...]) -> tuple[int, ...] | None:
        return self.operator.input_shape(y_shape)


class HiddenPosterior(BlackBoxTarget):
    """A target whose operator is hidden; sliced Wasserstein-1 to as many exact samples, mean over four sets."""

    metric = "SW1"

    def __init__(self, target: Target) -> None:
        self.name, self.prior, self.target = f"hidden {target.name}", target.prior, target

    @cached_property
    def expected(self) -> float:
        x = self.target.posterior.sample(20_000, seed=-1)
        return float(self.problem().repeat(len(x), 1).evaluate(x)[0].mean())

    def problem(self) -> Problem:
        likelihood = self.target.problem().likelihood
        assert likelihood is not None
        hidden = Likelihood(Hidden(self.target.operator), likelihood.y, likelihood.noise)
        return Problem(self.prior, hidden)

    def sample(self, n: int, seed: int) -> Tensor:
        return self.prior.to_data(self.target.posterior.sample(n, seed))

    def distance(self, samples: Tensor, weights: Tensor, seed: int) -> float:
        equal = unweighted(samples, weights)
        exact = [self.sample(len(equal), seed + i) for i in range(4)]
        return sum(sliced_wasserstein(equal.to(x), x, seed=seed) for x in exact) / 4


def three_blobs() -> GaussianMixture:
    """The plane's prior: three correlated Gaussians with weights 0.5, 0.3 and 0.2."""
    covariances = [[[0.5, 0.2], [0.2, 0.4]], [[0.6, -0.3], [-0.3, 0.5]], [[0.8, 0.0], [0.0, 0.3]]]
    return GaussianMixture(
        [[-2.0, -1.0], [2.0, -1.5], [0.0, 2.0]], torch.tensor(covariances), [0.5, 0.3, 0.2]
    )


def black_box_targets(large: bool = False) -> tuple[BlackBoxTarget, ...]:
    """The table's default: three rewards on the plane, three posteriors in 8 dimensions; `large`: three more in 80."""
    planes = (
        TiltedPlane("staircase", three_blobs(), Staircase()),
        TiltedPlane("indicator", three_blobs(), Indicator(height=4.0, width=1.5)),
        TiltedPlane("checkerboard", three_blobs(), Checkerboard(height=3.0)),
    )
    sizes = (8, 80) if large else (8,)
    return planes + tuple(HiddenPosterior(mixture_25(d, dy)) for d in sizes for dy in (1, 2, 4))
