"""Operator, measurement and noise law together: log p(y | x) in data units."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from invguide.errors import InputError, ShapeError
from invguide.forward_operator import Operator, check_batch
from invguide.noise import Gaussian, LogDensity, NoiseModel


class Likelihood:
    """log p(y | x) of measurements y (B, *y_shape) under an operator and a noise law.

    Row i of x is compared with row i of y; `rows` selects (and repeats) measurements, so that the driver can pair
    any sample with its own measurement.

    Args:
        operator: Map from data to measurement.
        y: Measurements, batched; every value finite.
        noise: A noise law, a number or tensor (Gaussian sigma_y), or a callable log density.

    Raises:
        InputError: Non-finite y, or noise parameters that cannot be.
        ShapeError: sigma_y that does not fit y.
    """

    def __init__(
        self,
        operator: Operator,
        y: Tensor,
        noise: NoiseModel | Tensor | float | Callable[..., Tensor],
    ) -> None:
        y = torch.as_tensor(y)
        y = y if y.is_floating_point() or y.is_complex() else y.to(torch.get_default_dtype())
        if y.ndim < 1 or len(y) == 0:
            raise InputError(
                f"y has shape {tuple(y.shape)}; expected a batch of at least one measurement (B, *y_shape)"
            )
        known = operator.observed()
        if known is not None:
            try:
                y = torch.where(known.to(y.device), y, 0)
            except RuntimeError as error:
                raise ShapeError(
                    f"{operator} observes entries of shape {tuple(known.shape)}, which does not fit one measurement "
                    f"of shape {tuple(y.shape[1:])}; resize the mask or the measurement"
                ) from error
        bad = ~torch.isfinite(y)
        if bool(bad.any()):
            where = tuple(int(i) for i in bad.nonzero()[0])
            raise InputError(
                f"y has {int(bad.sum())} NaN or infinite values (first at index {where}); every value must be finite: "
                f"leave unknown values out with an Inpainting mask instead"
            )
        if not isinstance(noise, NoiseModel):
            noise = (
                LogDensity(noise)
                if callable(noise) and not isinstance(noise, Tensor)
                else Gaussian(noise)
            )
        self.operator, self.y = operator, y.detach()
        self.noise = noise.bind(self.y)

    @classmethod
    def _of(cls, operator: Operator, y: Tensor, noise: NoiseModel) -> Likelihood:
        self = cls.__new__(cls)
        self.operator, self.y, self.noise = operator, y, noise
        return self

    def rows(self, index: Tensor) -> Likelihood:
        """Return the likelihood of y[index]; index (N,) may repeat measurements."""
        index = index.to(self.y.device)
        return self._of(self.operator, self.y[index], self.noise.rows(index))

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Likelihood:
        kind = torch.complex(torch.zeros(0, dtype=dtype), torch.zeros(0, dtype=dtype)).dtype
        y = self.y.to(device=device, dtype=kind if self.y.is_complex() else dtype)
        return self._of(self.operator.to(device), y, self.noise.to(device, dtype))

    def through(self, decode: Callable[[Tensor], Tensor]) -> Likelihood:
        """Return the likelihood of z, where x = decode(z)."""
        return self._of(_Through(self.operator, decode), self.y, self.noise)

    @property
    def differentiable(self) -> bool:
        return self.operator.differentiable

    def evaluate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (log_prob, chi2) of clean signals x (B, *shape), each (B,), from one call of the operator.

        log_prob is log p(y | x) up to a constant. chi2 is the mean of |y - A x|^2 / sigma_y^2 over the
        measurement, near 1 for the truth; complex values count as two; NaN where the noise law tells no
        standard deviation.
        """
        predicted = self._predict(x)
        log_prob = self.noise.log_density(predicted, self.y)
        square = self.noise.square(log_prob.detach(), predicted.detach(), self.y)
        return log_prob, square / self.size

    def whitened(self, x: Tensor) -> Tensor:
        """(y - A x) / sigma_y of what is observed, as real numbers: (B, *shape) -> (B, size).

        Raises:
            InputError: The noise law tells no standard deviation.
        """
        predicted = self._predict(x)
        sigma = self.noise.sigma(predicted, self.y)
        if sigma is None:
            raise InputError(
                f"{type(self.noise).__name__} tells no standard deviation of y; expected Gaussian or Poisson noise"
            )
        scaled = _real((self.y - predicted) / sigma).flatten(1)
        known = self.operator.observed()
        if known is None:
            return scaled
        known = known.to(self.y.device).expand(self.y.shape[1:]).flatten()
        return scaled[:, known.repeat_interleave(2) if self.y.is_complex() else known]

    def _predict(self, x: Tensor) -> Tensor:
        predicted = self.operator(x)
        check_batch(self.operator, x, predicted)
        if predicted.shape != self.y.shape:
            raise ShapeError(
                f"{type(self.operator).__name__} maps {tuple(x.shape[1:])} to {tuple(predicted.shape[1:])}, but one "
                f"measurement has shape {tuple(self.y.shape[1:])}; is y batched (B, *y_shape), and is `shape` right?"
            )
        return predicted

    @property
    def size(self) -> float:
        """How many real numbers of one measurement carry information; complex values count as two."""
        known = self.operator.observed()
        parts = 2 if self.y.is_complex() else 1
        return parts * self.y[0].numel() * (1.0 if known is None else known.double().mean().item())

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(y | x) up to a constant, (B, *shape) -> (B,)."""
        return self.evaluate(x)[0]

    def chi2(self, x: Tensor) -> Tensor:
        """Mean of |y - A x|^2 / sigma_y^2 over the measurement, (B, *shape) -> (B,)."""
        return self.evaluate(x)[1]

    def residual(self, x: Tensor) -> Tensor:
        """y - A x, in measurement units, (B, *shape) -> (B, *y_shape)."""
        return self.y - self.operator(x)


class _Through(Operator):
    """A(decode(z))."""

    def __init__(self, operator: Operator, decode: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.operator, self.decode = operator, decode
        self.differentiable = operator.differentiable

    def forward(self, x: Tensor) -> Tensor:
        return self.operator(self.decode(x))

    def observed(self) -> Tensor | None:
        return self.operator.observed()


def _real(values: Tensor) -> Tensor:
    return torch.view_as_real(values) if values.is_complex() else values
