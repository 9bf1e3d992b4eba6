"""A linear operator in units of its noise: what conjugate gradients and closed forms see."""

from __future__ import annotations

from torch import Tensor

from invguide.forward_operator import LinearOperator
from invguide.likelihood import Likelihood
from invguide.noise.model import GaussianLaw


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
