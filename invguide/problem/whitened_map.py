"""A linear operator in units of its noise: what conjugate gradients and closed forms see."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from invguide.forward_operator import LinearOperator
from invguide.likelihood import Likelihood
from invguide.noise.model import GaussianLaw
from invguide.numerics.linear import inner, per_sample
from invguide.prior import Prior


class WhitenedMap(LinearOperator):
    """L^-1 A, the covariance of the noise being L L*, with zeros where y is unknown; data units in, none out.

    Whatever the units of y and the covariance, `y` is then this map of x and white noise of variance 1.
    """

    def __init__(self, likelihood: Likelihood) -> None:
        super().__init__()
        operator, noise = likelihood.operator, likelihood.noise
        assert isinstance(operator, LinearOperator)
        assert isinstance(noise, GaussianLaw)
        self.operator, self.noise, self._likelihood = operator, noise, likelihood

    @property
    def y(self) -> Tensor:
        """The whitened measurement, (B, *y_shape)."""
        return self.noise.whiten(self._likelihood.y)

    def forward(self, x: Tensor) -> Tensor:
        return self.noise.whiten(self._known(self.operator(x)))

    def adjoint(self, y: Tensor) -> Tensor:
        return self.operator.adjoint(self._known(self.noise.whiten_adjoint(y)))

    def residual(self, x: Tensor) -> Tensor:
        """L^-1 (y - A x)."""
        return self.noise.whiten(self._likelihood.residual(x))

    def input_shape(self, y_shape: tuple[int, ...]) -> tuple[int, ...] | None:
        return self.operator.input_shape(y_shape)

    def _known(self, values: Tensor) -> Tensor:
        return self._likelihood.only_known(values) if self._likelihood.masked else values


class WhitenedLinear:
    """L^-1 (y - A x) as an affine function of x in normalised units, for a linear operator and Gaussian noise."""

    def __init__(self, likelihood: Likelihood, prior: Prior) -> None:
        self.likelihood, self.prior = likelihood, prior
        self.white = WhitenedMap(likelihood)

    def residual(self, x: Tensor) -> Tensor:
        """(B, *shape) -> (B, *y_shape)."""
        return self.white.residual(self.prior.to_data(x))

    def forward(self, v: Tensor) -> Tensor:
        """Of a change of x."""
        return self.white(self.prior.scale * v)

    def adjoint(self, u: Tensor) -> Tensor:
        return self.prior.scale * self.white.adjoint(u)

    def draw(self, noise: Callable[..., Tensor], purpose: str) -> Tensor:
        """Whitened measurement noise, (B, *y_shape), 0 where nothing is observed; a complex one has two parts."""
        y = self.likelihood.y
        e = noise(purpose, tuple(y.shape[1:]))
        if y.is_complex():
            e = torch.complex(e, noise(f"{purpose}, imaginary", tuple(y.shape[1:])))
        return self.likelihood.only_known(e)

    def precondition(self, u: Tensor, variance: Tensor) -> Tensor:
        """About (I + variance A A* / sigma_y^2)^-1 u, variance (B,), normalised; u where no one sigma_y holds for y.

        Exact where the operator can solve in closed form, else to a relative residual of 0.05: steps of conjugate
        gradients that are preconditioned so need no more.
        """
        sigma = self.white.noise.one_sigma
        if sigma is None:
            return u
        ridge = (sigma / self.prior.scale) ** 2 / variance
        near = 0.05 * inner(u, u).sqrt() / (2 * ridge.sqrt())
        solved = self.white.operator.solve_within(u, ridge, near) * per_sample(ridge, u.real)
        return self.likelihood.only_known(solved) if self.likelihood.masked else solved
