"""What every law of a measurement given its noiseless value has in common; the laws are in `invguide.noise`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from copy import copy
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from invguide.arguments.arrays import Refused, as_tensor
from invguide.arguments.checks import Checked, shown
from invguide.arguments.entries import Entries, check_signals, check_size
from invguide.errors import InputError, ShapeError
from invguide.system.surroundings import usable

Law = TypeVar("Law", bound="NoiseModel")


class NoiseModel(Entries, metaclass=Checked):
    """One law; `bind` fixes it to a batch of measurements, `rows` selects some of them.

    The tensors named in `tensors` are its parameters; once bound, they have a batch axis of B. log p(y | A x) is
    bounded above in A x, whatever a solver predicts.
    """

    entries = (
        "bind", "log_density", "sigma", "whitened", "squares", "local_sigma", "marginal", "rows", "posterior_mean",
        "agreement", "whiten", "whiten_adjoint",
    )  # fmt: skip
    tensors: ClassVar[tuple[str, ...]] = ()
    reweightings: ClassVar[int] = (
        0  # of a data step through `local_sigma`, each at the point of the one before
    )

    def check_given(self, method: str, given: dict[str, Any]) -> None:
        who = f"{type(self).__name__}.{method}"
        for name in ("y", "predicted", "residual", "u"):
            if name in given:
                check_signals(who, name, given[name])
        if "variance" in given:
            check_size(who, "variance", given["variance"])
        y, predicted = given.get("y"), given.get("predicted")
        if y is None or predicted is None:
            return
        if y.shape != predicted.shape or y.is_complex() != predicted.is_complex():
            raise ShapeError(
                f"{who}: predicted is {shown(predicted)} and y {shown(y)}; expected the same kind and shape"
            )

    def check_answer(self, method: str, given: dict[str, Any], answer: Any) -> None:
        who = f"{type(self).__name__}.{method}"
        if method == "log_density" and answer.shape != (len(given["y"]),):
            raise ShapeError(
                f"{who}: y is {shown(given['y'])}, which is not what this law is bound to"
            )
        for name in ("y", "residual", "u"):
            each = method in ("whitened", "squares", "whiten", "whiten_adjoint")
            if each and name in given and answer is not None and answer.shape != given[name].shape:
                raise ShapeError(
                    f"{who}: {name} is {shown(given[name])}, which is not what this law is bound to"
                )

    @abstractmethod
    def bind(self: Law, y: Tensor) -> Law:
        """Check the parameters against y (B, *y_shape) and return a law whose tensors have a batch axis."""

    @abstractmethod
    def log_density(self, predicted: Tensor, y: Tensor) -> Tensor:
        """log p(y | predicted) up to a constant in predicted, (B, *y_shape) twice -> (B,)."""

    @abstractmethod
    def sigma(self, predicted: Tensor, y: Tensor) -> Tensor | None:
        """Standard deviation of y around its mean, broadcastable to y; None where the law does not tell."""

    def whitened(self, predicted: Tensor, y: Tensor) -> Tensor | None:
        """Residual of mean 0 and covariance I at the truth, shape of y; None where the law tells no deviation.

        For Gaussian laws log p = -|r|^2 / 2 exactly; for others it is one of their standard deviation.
        """
        sigma = self.sigma(predicted, y)
        return None if sigma is None else (y - predicted) / sigma

    def local_sigma(self, predicted: Tensor, y: Tensor) -> Tensor:
        """Standard deviation of the Gaussian around y that has this law's slope at `predicted`, shape of y.

        (y - predicted) / sigma^2 = d log p / d predicted, bounded away from 0. Of laws with `reweightings`.
        """
        raise NotImplementedError

    def squares(self, predicted: Tensor, y: Tensor) -> Tensor | None:
        """What chi2 is the mean of, (B, *y_shape): of expectation 1 at the truth, 2 for complex y.

        |r|^2 of the whitened residual; None where the law tells none.
        """
        r = self.whitened(predicted, y)
        return None if r is None else r.abs() ** 2

    def marginal(self: Law, known: Tensor) -> Law:
        """The law of the entries that are known, booleans (1 or B, *y_shape); the others are 0 in both arguments."""
        return self  # entries are independent; equal arguments add a constant

    def rows(self: Law, index: Tensor) -> Law:
        return self._each(lambda t: t[index])

    def to(self: Law, device: torch.device | str, dtype: torch.dtype) -> Law:
        def moved(t: Tensor) -> Tensor:
            return t.to(device=device, dtype=dtype.to_complex() if t.is_complex() else dtype)

        return self._each(moved)

    def usable(self: Law) -> Law:
        """The law with parameters that gradients may go through: see `invguide.system.surroundings`."""
        return self._each(usable)

    def _each(self: Law, change: Callable[[Tensor], Tensor]) -> Law:
        """A copy whose tensors are changed."""
        return self._with(**{name: change(getattr(self, name)) for name in self.tensors})

    def _with(self: Law, **values: object) -> Law:
        law = copy(self)
        vars(law).update(values)
        return law


class GaussianLaw(NoiseModel):
    """y = A x + n, n normal with covariance C = L L*; complex numbers count as in `invguide.noise.Gaussian`."""

    @abstractmethod
    def whiten(self, residual: Tensor) -> Tensor:
        """L^-1 r, (N, *y_shape), N = B or 1 of either."""

    @abstractmethod
    def whiten_adjoint(self, u: Tensor) -> Tensor:
        """L^-* u."""

    @property
    def one_sigma(self) -> Tensor | None:
        """Where C is sigma_y^2 I for every measurement, sigma_y of each, (B,); else None."""
        return None

    def whitened(self, predicted: Tensor, y: Tensor) -> Tensor:
        return self.whiten(y - predicted)

    def log_density(self, predicted: Tensor, y: Tensor) -> Tensor:
        r = self.whiten(y - predicted)
        square = r.real**2 + r.imag**2 if r.is_complex() else r**2
        return -0.5 * square.flatten(1).sum(1)


def number(value: Tensor | np.ndarray | float, complex_too: bool = False) -> Tensor:
    """A parameter as given by a user, as a tensor; `complex_too`: it may be complex, as a covariance of complex y.

    Raises:
        InputError: No numbers, none at all, or complex ones.
    """
    try:
        tensor = as_tensor(value)
    except Refused as refused:
        wanted = str(refused) or "expected real numbers, at least one"
        raise InputError(f"a noise law was given {shown(value)}; {wanted}") from None
    if not isinstance(value, Tensor) and not tensor.is_complex():
        tensor = tensor.double()
    if (tensor.is_complex() and not complex_too) or not tensor.numel():
        raise InputError(
            f"a noise law was given {shown(tensor)}; expected real numbers, at least one"
        )
    return tensor


def fitted(value: Tensor, y: Tensor, name: str) -> Tensor:
    """A number, a value per element of one measurement, or what broadcasts to y (B, ...), as rows of y's rank."""
    value = value.detach().to(device=y.device, dtype=y.real.dtype)
    given = tuple(value.shape)
    if value.shape == y.shape[1:] and value.ndim:
        value = value[None]
    try:
        # numpy's: torch's takes a second to import sympy.
        fits = value.ndim in (0, y.ndim) and np.broadcast_shapes(value.shape, y.shape) == y.shape
    except ValueError:
        fits = False
    if not fits:
        raise ShapeError(
            f"{name} has shape {given}; expected a number, one value per element {tuple(y.shape[1:])}, or a shape of "
            f"{y.ndim} axes that broadcasts to y {tuple(y.shape)}"
        )
    if value.ndim:
        return value.expand(len(y), *value.shape[1:])
    return value.expand(len(y)).reshape(-1, *(1,) * (y.ndim - 1))
