"""Operator, measurement and noise law together: log p(y | x) in data units."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from invguide.arguments.arrays import as_tensor
from invguide.arguments.checks import Checked
from invguide.arguments.entries import Entries, check_signals
from invguide.arguments.rules import Batch
from invguide.errors import InputError, ShapeError
from invguide.forward_operator import LinearOperator, Operator, check_batch
from invguide.noise import Gaussian, LogDensity, NoiseModel
from invguide.numerics.trial import gradient_fault
from invguide.system.surroundings import usable


class Likelihood(Entries, metaclass=Checked):
    """log p(y | x) of measurements y (B, *y_shape) under an operator and a noise law.

    Row i of x is compared with row i of y; `rows` selects (and repeats) measurements, so that the driver can pair
    any sample with its own measurement.

    Args:
        operator: Map from data to measurement.
        y: Measurements, batched; every value that is known is finite.
        noise: A noise law, a number or tensor (Gaussian sigma_y), or a callable log density, which sees zeros in place
            of unknown values.
        mask: Which values of y are known: booleans, or 1 and 0; the shape of one measurement, or of y, or what
            broadcasts to either. None: all, but for what a masked array leaves out.

    Attributes:
        known: (1 or B, *y_shape) booleans, from the mask and `operator.observed()`; None: all. y is zero elsewhere.
        masked: Whether `known` leaves out more than the operator does by itself.

    Raises:
        InputError: Non-finite y, a measurement of which nothing is known, or noise parameters that cannot be.
        ShapeError: sigma_y or the mask do not fit y.
    """

    entries = ("log_prob", "chi2", "evaluate", "whitened", "residual", "rows")

    def __init__(
        self,
        operator: Operator,
        y: Batch,
        noise: NoiseModel | Tensor | float | Callable[..., Tensor],
        mask: Tensor | np.ndarray | None = None,
    ) -> None:
        given = None if mask is None else torch.as_tensor(mask)
        if isinstance(y, np.ma.MaskedArray):
            there = torch.as_tensor(~np.ma.getmaskarray(y))
            given = there if given is None else _as_booleans(given, there) & there
            y = as_tensor(y.filled(0))
        assert isinstance(y, Tensor)
        whole = not (y.is_floating_point() or y.is_complex())
        y = y.to(torch.get_default_dtype()) if whole else y
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
            known = known.to(y.device)[(None,) * (y.ndim - known.ndim)].expand(1, *y.shape[1:])
        given = None if given is None else _as_booleans(given, y)
        self.masked = given is not None and not bool(given.all())
        if given is not None and self.masked:
            known = given if known is None else known & given
            y = torch.where(known, y, 0)
            empty = ~known.flatten(1).any(1)
            if bool(empty.any()):
                raise InputError(
                    f"nothing of measurement {int(empty.nonzero()[0])} is known: the mask leaves out every value"
                )
        self.known = known
        bad = ~torch.isfinite(y)
        if bool(bad.any()):
            where = tuple(int(i) for i in bad.nonzero()[0])
            raise InputError(
                f"y has {int(bad.sum())} NaN or infinite values (first at index {where}); every value must be finite: "
                f"leave unknown values out by mask=..., 1 where y is known"
            )
        if not isinstance(noise, NoiseModel):
            noise = (
                LogDensity(noise)
                if callable(noise) and not isinstance(noise, Tensor)
                else Gaussian(noise)
            )
        if whole and isinstance(noise, Gaussian) and bool((y.abs() > 1).any()):
            raise InputError(
                f"y holds whole numbers up to {y.abs().max().item():g}, and images are in [0, 1]: pass y / 255 (and "
                "sigma_y / 255). For measurements in other units pass y.astype(float); counts of photons have a law of "
                "their own, noise=Poisson(gain)"
            )
        self.operator, self.y = operator, usable(y.detach())
        self.noise = noise.bind(self.y).usable()
        if known is not None:
            self.noise = self.noise.marginal(known)
        self.fault: str | None = None  # of the operator's gradient, as `try_gradient` found

    def check_given(self, method: str, given: dict[str, Any]) -> None:
        if "x" in given:
            check_signals(f"Likelihood.{method}", "x", given["x"])

    def _with(self, **changes: Any) -> Likelihood:
        part = copy(self)
        vars(part).update(changes)
        return part

    def try_gradient(self, x: Tensor) -> None:
        """Find out on clean signals x (B, *shape), data units, whether the operator's gradient is of use.

        Where it is not, that of a linear operator is taken from its adjoint; any other is a black box from then on.

        Raises:
            InputError: The operator changes its input.
        """

        def measure(x: Tensor) -> Tensor:
            version = x._version
            y = self.operator(x)
            if x._version != version:
                name = type(self.operator).__name__
                raise InputError(
                    f"{name} changes its input in place, which a solver still needs; begin its forward with "
                    "x = x.clone()"
                )
            return y

        fault = getattr(self.operator, "fault", None) or "it says differentiable = False"
        if self.operator.differentiable:
            found = gradient_fault(measure, x)
            fault = None if found is None else f"its gradient {found}"
        self.fault = fault

    @property
    def _measure(self) -> Operator:
        """The operator, with a gradient where its own is of no use and there is another."""
        if self.fault is None or not isinstance(self.operator, LinearOperator):
            return self.operator
        return _ByAdjoint(self.operator)

    def rows(self, index: Tensor) -> Likelihood:
        """Return the likelihood of y[index]; index (N,) may repeat measurements."""
        index = index.to(self.y.device)
        known = self.known
        if known is not None and len(known) > 1:
            known = known[index]
        operator = self.operator.rows(index)
        return self._with(
            operator=operator, y=self.y[index], noise=self.noise.rows(index), known=known
        )

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Likelihood:
        kind = torch.complex(torch.zeros(0, dtype=dtype), torch.zeros(0, dtype=dtype)).dtype
        y = self.y.to(device=device, dtype=kind if self.y.is_complex() else dtype)
        known = None if self.known is None else self.known.to(device)
        noise = self.noise.to(device, dtype)
        return self._with(operator=self.operator.to(device), y=y, noise=noise, known=known)

    def with_noise(self, noise: NoiseModel) -> Likelihood:
        """Return the likelihood of the same measurements under another law, bound to them already."""
        return self._with(noise=noise)

    def through(self, decode: Callable[[Tensor], Tensor]) -> Likelihood:
        """Return the likelihood of z, where x = decode(z)."""
        through = self._with(operator=_Through(self._measure, decode))
        through.fault = None if through.operator.differentiable else self.fault
        return through

    @property
    def differentiable(self) -> bool:
        if self.fault is not None:
            return isinstance(self.operator, LinearOperator)
        return self.operator.differentiable

    def evaluate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (log_prob, chi2) of clean signals x (B, *shape), each (B,), from one call of the operator.

        log_prob is log p(y | x) up to a constant. chi2 is the mean of |y - A x|^2 / sigma_y^2 over the
        measurement, near 1 for the truth, or what the noise law has in its place (`NoiseModel.squares`); complex values
        count as two; NaN where the noise law tells no standard deviation.
        """
        predicted = self._predict(x)
        log_prob = self.noise.log_density(predicted, self.y)
        squares = self.noise.squares(predicted.detach(), self.y)
        if squares is None:
            return log_prob, torch.full_like(log_prob, float("nan")).detach()
        if self.known is not None:
            squares = squares * self.known
        return log_prob, squares.flatten(1).sum(1) / self.sizes

    def whitened(self, x: Tensor) -> Tensor:
        """L^-1 (y - A x), L L* the covariance, of what is known, as real numbers: (B, *shape) -> (B, size).

        Where the law is not Gaussian, it is taken as one of its mean and standard deviation.

        Raises:
            InputError: The noise law tells no standard deviation.
        """
        residual = self.noise.whitened(self._predict(x), self.y)
        if residual is None:
            raise InputError(
                f"{type(self.noise).__name__} tells no standard deviation of y; expected Gaussian noise, or another "
                "law with a variance (Poisson, Laplace, ...)"
            )
        scaled = real_parts(residual).flatten(1)
        if self.known is None:
            return scaled
        known = real_parts(self.known.expand(self.y.shape) * torch.ones_like(self.y[:1]))
        known = known.flatten(1) != 0
        return torch.where(known, scaled, 0.0)[:, known.any(0)]

    def _predict(self, x: Tensor) -> Tensor:
        predicted = self._measure(x)
        check_batch(self.operator, x, predicted)
        if predicted.is_complex() != self.y.is_complex():
            kinds = ("complex", "real") if predicted.is_complex() else ("real", "complex")
            raise InputError(
                f"{type(self.operator).__name__} returns {kinds[0]} values, and y is {kinds[1]}; expected the same: "
                "the real and imaginary part of a number are measured both, or the operator drops one"
            )
        predicted = predicted if not self.masked else self.only_known(predicted)
        if predicted.shape != self.y.shape:
            raise ShapeError(
                f"{type(self.operator).__name__} maps {tuple(x.shape[1:])} to {tuple(predicted.shape[1:])}, but one "
                f"measurement has shape {tuple(self.y.shape[1:])}; is y batched (B, *y_shape), and is `shape` right?"
            )
        return predicted

    @property
    def size(self) -> float:
        """How many real numbers of one measurement carry information, on average; complex values count as two."""
        parts = 2 if self.y.is_complex() else 1
        share = 1.0 if self.known is None else self.known.double().mean().item()
        return parts * self.y[0].numel() * share

    @property
    def sizes(self) -> Tensor:
        """The same of each measurement, (B,)."""
        whole = self.y.real.new_full((len(self.y),), self.size)
        if self.known is None or len(self.known) == 1:
            return whole
        parts = 2 if self.y.is_complex() else 1
        return parts * self.known.flatten(1).sum(1).to(whole)

    def only_known(self, values: Tensor) -> Tensor:
        """The values with zeros where y is unknown, (B, *y_shape)."""
        return values if self.known is None else torch.where(self.known, values, 0)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(y | x) up to a constant, (B, *shape) -> (B,)."""
        return self.evaluate(x)[0]

    def chi2(self, x: Tensor) -> Tensor:
        """Mean of |y - A x|^2 / sigma_y^2 over the measurement, (B, *shape) -> (B,)."""
        return self.evaluate(x)[1]

    def residual(self, x: Tensor) -> Tensor:
        """y - A x, in measurement units, (B, *shape) -> (B, *y_shape)."""
        residual = self.y - self._predict(x)
        return self.only_known(residual) if self.masked else residual


class _ByAdjoint(Operator):
    """A linear operator whose gradient is its adjoint."""

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__()
        self.operator = operator

    def forward(self, x: Tensor) -> Tensor:
        image = _Linear.apply(x, self.operator)
        assert isinstance(image, Tensor)
        return image

    def observed(self) -> Tensor | None:
        return self.operator.observed()

    def rows(self, index: Tensor) -> Operator:
        part = self.operator.rows(index)
        assert isinstance(part, LinearOperator)
        return _ByAdjoint(part)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, operator: LinearOperator) -> Tensor:
        ctx.operator = operator
        return operator(x.detach()).detach().clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, bar: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.operator.adjoint(bar), None


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


def _as_booleans(mask: Tensor, y: Tensor) -> Tensor:
    """A mask as booleans of shape (1 or B, *y_shape)."""
    values = mask if mask.dtype == torch.bool else mask != 0
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise InputError(
            f"the mask of y has values other than 0 and 1, such as {mask[(mask != 0) & (mask != 1)][0].item():g}; "
            "expected 1 where y is known and 0 where it is not"
        )
    values = values.to(y.device)
    if values.ndim == y.ndim - 1 or values.shape == y.shape[1:]:
        values = values[None]
    try:
        np.broadcast_shapes(values.shape, y.shape)
        return values.expand(len(values), *y.shape[1:])
    except (RuntimeError, ValueError) as error:
        raise ShapeError(
            f"the mask has shape {tuple(mask.shape)}; expected that of one measurement {tuple(y.shape[1:])} or of "
            f"y {tuple(y.shape)}"
        ) from error


def real_parts(values: Tensor) -> Tensor:
    """Complex values as pairs of reals, in one more axis."""
    return torch.view_as_real(values) if values.is_complex() else values
