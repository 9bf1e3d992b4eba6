"""Foreign forward models as operators, and operators as deepinv physics.

deepinv is imported where it is needed only: it takes longer than torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from invguide.adapters.deepinv import DeepinvOperator, from_deepinv
from invguide.arguments.checks import checked
from invguide.arguments.rules import Shape
from invguide.errors import InputError, ShapeError, require
from invguide.forward_operator import LinearOperator, Operator, check_batch
from invguide.noise import Gaussian, Poisson
from invguide.numerics.trial import (
    adjoint_defect,
    adjoint_limit,
    evaluating,
    gradient_fault,
    modules_of,
)

if TYPE_CHECKING:
    from deepinv.physics import Physics


@checked
def as_operator(
    model: Any,
    *,
    adjoint: Callable[[Tensor], Tensor] | None = None,
    shape: Shape | None = None,
    linear: bool = False,
) -> Operator:
    """Return any forward model as an operator.

    Args:
        model: An Operator (returned as it is), a deepinv Physics, a torch callable or module, or a numpy function,
            which becomes a black box (`differentiable` is False). Callables map a batch (B, *shape) in data units
            to a batch (B, *y_shape).
        adjoint: The exact adjoint of a callable, which is then a LinearOperator.
        shape: Shape of one x for a callable, where known; it is then tried at once.
        linear: The torch callable is linear, and its adjoint is taken by automatic differentiation; needs `shape`.

    Raises:
        InputError: Not a forward model, or one that cannot be called with this shape.

    Example:
        >>> import torch
        >>> as_operator(lambda x: x[..., ::2])(torch.ones(1, 1, 4, 4)).shape
        torch.Size([1, 1, 4, 2])
    """
    if isinstance(model, Operator):
        return model
    if inspect.isclass(model):
        raise InputError(
            f"the operator is the class {model.__name__}; pass an instance, {model.__name__}(...)"
        )
    if any(kind.__module__.startswith("deepinv.physics") for kind in type(model).__mro__):
        return from_deepinv(model)
    if not callable(model):
        raise InputError(
            f"the operator is a {type(model).__name__}; expected an Operator, a callable (B, *shape) -> (B, *y_shape) "
            f"or a deepinv Physics. For a matrix M pass lambda x: x.flatten(1) @ M.T"
        )
    if adjoint is None and linear and shape is None:
        raise InputError(
            "linear=True takes the adjoint by automatic differentiation, which needs shape=(...) of one x"
        )
    if adjoint is not None or linear:
        return LinearFunctionOperator(model, adjoint, shape)
    return FunctionOperator(model, shape)


# ---- callables


class FunctionOperator(Operator):
    """A callable on torch tensors or numpy arrays, (B, *shape) -> (B, *y_shape).

    The first call finds out which, and whether gradients reach x and are not zero wherever one looks; until then
    `differentiable` is True, and afterwards `fault` says why it is not. The function is given a copy of x each time, so
    that it may write into it, and arrays come back in the dtype and on the device of x. Modules that it holds (itself,
    its owner, its closure) run in evaluation mode and are left as they were found.

    Args:
        function: The callable.
        shape: Shape of one x; given, the function is tried at once.

    Raises:
        InputError: Neither a tensor nor an array can be passed, or something else is returned.
        ShapeError: The batch axis is not kept.
    """

    def __init__(
        self, function: Callable[[Any], Any], shape: tuple[int, ...] | None = None
    ) -> None:
        super().__init__()
        self.function = function
        self.shape = None if shape is None else tuple(shape)
        self._numpy = False
        self._differentiable: bool | None = None
        self.fault: str | None = None
        if self.shape is not None:
            self.probe(torch.full((1, *self.shape), 0.5))

    @property
    def differentiable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._differentiable is not False

    def probe(self, x: Tensor) -> None:
        """Call the function once on x (B, *shape) to find out its kind."""
        with torch.inference_mode(False), torch.enable_grad():
            x = x.detach().clone().requires_grad_()
            try:
                y = self._call(x.clone())
            except Exception as error:
                y = self._try_numpy(x, error)
            if not isinstance(y, Tensor | np.ndarray):
                raise InputError(
                    f"{self._name} returned {type(y).__name__}; expected one tensor or array (B, *y_shape)"
                )
            self._numpy = not isinstance(y, Tensor)
            self.fault = self._fault(x, y) if isinstance(y, Tensor) else "it works on numpy arrays"
            self._differentiable = self.fault is None

    def _fault(self, x: Tensor, y: Tensor) -> str | None:
        fault = gradient_fault(self._call, x, y)
        return None if fault is None else f"its gradient {fault}"

    def _call(self, x: Any) -> Any:
        with evaluating(*modules_of(self.function), but=Operator):
            return self.function(x)

    def _try_numpy(self, x: Tensor, error: Exception) -> np.ndarray:
        try:
            y = self._call(_to_array(x))
        except Exception as second:
            shape = tuple(x.shape)
            raise InputError(
                f"{self._name} takes neither a tensor of shape {shape} ({type(error).__name__}: {error}) nor an array "
                f"({type(second).__name__}: {second}); expected (B, *shape) -> (B, *y_shape)"
            ) from error
        if isinstance(y, np.ndarray):
            return y
        raise InputError(
            f"{self._name} returned {type(y).__name__} for an array; expected an array (B, *y_shape)"
        )

    @property
    def _name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    def forward(self, x: Tensor) -> Tensor:
        if self._differentiable is None:
            self.probe(x)
        y = _to_tensor(self._call(_to_array(x)), x) if self._numpy else self._call(x.clone())
        check_batch(self, x, y)
        return y

    def input_shape(self, y_shape: tuple[int, ...]) -> tuple[int, ...] | None:
        return self.shape

    def extra_repr(self) -> str:
        return self._name

    def identity_parts(self) -> Any:
        """What decides the results, for checkpoints; not what the first call finds out."""
        return {"function": self.function}


class LinearFunctionOperator(FunctionOperator, LinearOperator):
    """A linear callable with its adjoint, or with the one that automatic differentiation gives."""

    def __init__(
        self,
        function: Callable[[Any], Any],
        adjoint: Callable[[Tensor], Tensor] | None,
        shape: tuple[int, ...] | None,
    ) -> None:
        super().__init__(function, shape)
        self.adjoint_function = adjoint
        self._adjoint_tried = False
        if adjoint is None and not self.differentiable:
            raise InputError(
                f"{self._name} gives no gradient, so its adjoint is unknown; pass adjoint=..."
            )

    def adjoint(self, y: Tensor) -> Tensor:
        if not self._adjoint_tried:
            self._try_adjoint(y)
        return self._adjoint(y)

    def _try_adjoint(self, y: Tensor) -> None:
        """One dot test, before the adjoint is used for the first time."""
        back = self._adjoint(y)
        if self.shape is not None and tuple(back.shape[1:]) != self.shape:
            raise ShapeError(
                f"adjoint= of {self._name} maps {tuple(y.shape[1:])} to {tuple(back.shape[1:])}; expected {self.shape}"
            )
        defect, limit = adjoint_defect(self.forward, self._adjoint, back), adjoint_limit(y.dtype)
        if defect > limit:
            given = self.adjoint_function is not None
            fix = "leave linear=True out"
            if given:
                other = (
                    "it is then a black box" if self._numpy else "give linear=True and shape=..."
                )
                fix = f"pass its exact adjoint, or leave adjoint= out ({other})"
            raise InputError(
                f"|<A u, v> - <u, A* v>| / |A u||v| = {defect:.1g} for random u and v, above {limit:g}: "
                f"{'adjoint= is not the adjoint of ' if given else 'not linear is '}{self._name}; {fix}"
            )
        self._adjoint_tried = True

    def _adjoint(self, y: Tensor) -> Tensor:
        if self.adjoint_function is not None:
            return (
                _to_tensor(self.adjoint_function(_to_array(y)), y)
                if self._numpy
                else self.adjoint_function(y)
            )
        assert self.shape is not None
        with torch.inference_mode(False), torch.enable_grad():
            x = y.real.new_zeros((len(y), *self.shape), requires_grad=True)
            (gradient,) = torch.autograd.grad(
                self._call(x.clone()), x, y.clone(), create_graph=y.requires_grad
            )
        return gradient

    def identity_parts(self) -> Any:
        return {"function": self.function, "adjoint": self.adjoint_function}


def _to_array(x: Tensor) -> Any:
    return x.detach().cpu().numpy().copy()


def _to_tensor(y: Any, like: Tensor) -> Tensor:
    y = torch.as_tensor(np.array(y), device=like.device)
    return y.to(like.dtype.to_complex() if y.is_complex() else like.dtype)


# ---- to deepinv


@checked
def to_deepinv(operator: Operator, sigma_y: Tensor | float | None = None) -> Physics:
    """Return the operator as a `deepinv.physics.Physics`, or `LinearPhysics` with our exact prox and pseudo-inverse.

    Args:
        operator: The operator; one that came from deepinv returns as it came.
        sigma_y: Gaussian noise standard deviation, measurement units; None is the operator's own noise, or none.
    """
    require("deepinv", "Operator.to_deepinv")
    from deepinv import physics as dinv

    law = getattr(operator, "noise", None) if sigma_y is None else Gaussian(sigma_y)
    if isinstance(law, Gaussian):
        noise_model = dinv.GaussianNoise(
            law.sigma_y.flatten() if law.sigma_y.numel() > 1 else law.sigma_y.item()
        )
    elif isinstance(law, Poisson):
        noise_model = dinv.PoissonNoise(law.gain)
    elif law is None:
        noise_model = dinv.ZeroNoise()
    else:
        raise InputError(
            f"the noise law {type(law).__name__} is not turned into a noise model of deepinv; pass sigma_y=..., and "
            f"set the noise_model of the result"
        )
    if isinstance(operator, DeepinvOperator):
        physics = operator.physics.clone()
        physics.noise_model = noise_model
        return physics
    if isinstance(operator, LinearOperator):
        return _linear_physics(operator, noise_model)
    physics = dinv.Physics(A=lambda x, **_: operator(x), noise_model=noise_model)
    physics.operator = operator  # so that .to(device) reaches it
    return physics


def _linear_physics(operator: LinearOperator, noise_model: Any) -> Physics:
    from deepinv.physics import LinearPhysics

    class OperatorPhysics(LinearPhysics):
        def A_dagger(self, y: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return operator.pinv(y)

        def prox_l2(self, z: Any, y: Tensor, gamma: Any, *args: Any, **kwargs: Any) -> Tensor:
            ridge = 1 / torch.as_tensor(gamma, dtype=y.real.dtype, device=y.device).flatten()
            if not isinstance(z, Tensor):  # deepinv passes None or 0 for no z
                return operator.adjoint(operator.solve(y, ridge))
            return z + operator.adjoint(operator.solve(y - operator(z), ridge))

    physics = OperatorPhysics(
        A=lambda x, **_: operator(x),
        A_adjoint=lambda y, **_: operator.adjoint(y),
        noise_model=noise_model,
    )
    physics.operator = operator  # so that .to(device) reaches it
    return physics
