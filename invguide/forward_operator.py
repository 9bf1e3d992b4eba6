"""The Operator contracts: the map from a clean signal to its noiseless measurement, in data units."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from invguide.arguments.checks import Checked
from invguide.arguments.entries import Entries, check_per_sample, check_signals, check_size
from invguide.errors import ShapeError
from invguide.numerics.linear import conjugate_gradient, inner, norm, per_sample

if TYPE_CHECKING:
    from invguide.diagnostics.check import OperatorCheck


class SVD(NamedTuple):
    """A = U diag(s) V*, as functions on batches (B, *s.shape) -> (B, *shape) and back.

    U* U = V* V = I wherever s is not zero; s is real, may be negative, and has the shape of one spectral vector.
    Where s has fewer elements than x, what V* does not see is part of the null space.
    """

    s: Tensor
    U: Callable[[Tensor], Tensor]
    U_adjoint: Callable[[Tensor], Tensor]
    V: Callable[[Tensor], Tensor]
    V_adjoint: Callable[[Tensor], Tensor]


class Operator(Entries, nn.Module, metaclass=Checked):
    """A deterministic map from data to measurement: (B, *in_shape) -> (B, *out_shape); noise is not here.

    A module, so that `.to(device)` reaches masks and kernels (register them as buffers).
    """

    entries = (
        "forward", "adjoint", "pinv", "solve", "row_norms", "right_inverse", "posterior_mean", "rows", "input_shape",
        "svd", "check",
    )  # fmt: skip
    differentiable: bool = True

    def check_given(self, method: str, given: dict[str, Any]) -> None:
        who = f"{type(self).__name__}.{method}"
        for name in ("x", "y", "rhs"):
            if given.get(name) is not None:
                check_signals(who, name, given[name])
        for name in ("variance", "sigma"):
            if name in given:
                check_size(who, name, given[name])
        if "ridge" in given:
            check_per_sample(who, "ridge", given["ridge"], len(given["rhs"]))

    def check_answer(self, method: str, given: dict[str, Any], answer: Any) -> None:
        who = f"{type(self).__name__}.{method}"
        if method == "forward":
            check_batch(self, given["x"], answer)
            self._check_pair(who, "x", given["x"], answer)
        elif method in ("adjoint", "pinv"):
            self._check_pair(who, "y", answer, given["y"])
        elif method == "solve" and answer.shape != given["rhs"].shape:
            raise ShapeError(
                f"{who}: rhs has the shape {tuple(given['rhs'].shape)}, which is not that of y"
            )

    def _check_pair(self, who: str, name: str, x: Tensor, y: Tensor) -> None:
        """Raise unless x and y belong together as this operator says: what broadcasts may fit by mistake."""
        told = self.input_shape(tuple(y.shape[1:]))
        if len(x) != len(y) or (told is not None and tuple(told) != tuple(x.shape[1:])):
            shape = tuple(x.shape if name == "x" else y.shape)
            raise ShapeError(
                f"{who}: {name} has the shape {shape}; {tuple(x.shape)} and {tuple(y.shape)} are no x and y of "
                f"this operator, batches (B, ...)"
            )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Measure, with networks inside of the operator in evaluation mode: see `numerics.trial.evaluating`."""
        from invguide.numerics.trial import evaluating

        with evaluating(self, but=Operator):
            return super().__call__(*args, **kwargs)

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Measure clean signals x (B, *in_shape), data units; rows must be independent; complex outputs allowed."""

    def input_shape(self, y_shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return the shape of one x for one y of this shape (no batch axis), or None where it cannot be known."""
        return None

    def observed(self) -> Tensor | None:
        """Return which entries of one measurement carry information, booleans that broadcast to y_shape; None: all.

        The likelihood sets the others to zero and leaves them out of chi2, whatever they hold.
        """
        return None

    def rows(self, index: Tensor) -> Operator:
        """Return the operator of measurements index (N,), which may repeat; for parameters of each measurement."""
        return self

    def posterior_mean(
        self, x: Tensor, y: Tensor, variance: Tensor, sigma: Tensor
    ) -> Tensor | None:
        """Return E[z | y] of z ~ N(x, variance) and y = A z + sigma n, or None (the default) where that is not cheap.

        For operators that are not linear but can answer all the same, for instance value by value: the general data
        step descends, and stays where A has no slope, as behind clipping. `auto` then takes a solver with data steps.

        Args:
            x: Centres, (B, *shape), data units.
            y: Measurements, (B, *y_shape).
            variance: Of the clean signal around x, broadcasts to x.
            sigma: Standard deviation of y, broadcasts to y.
        """
        return None

    # ---- what the driver asks of operators whose calls are dear; only a BlackBox has something to say

    def keep(self, folder: str | Path) -> None:
        """Keep the result of every finished call in this folder, unless results are kept already."""

    def summary(self) -> dict[str, Any]:
        """Return calls, failures and seconds so far, ready for JSON; empty where nothing is counted."""
        return {}

    def progress_text(self) -> str:
        """Return the same in a few words, for the progress bar."""
        return ""

    def check(
        self,
        shape: tuple[int, ...] | None = None,
        x: Tensor | None = None,
        *,
        seed: int = 0,
        quiet: bool = False,
    ) -> OperatorCheck:
        """Examine the operator on clean signals x (B, *shape), or random ones of `shape`; print and return a table."""
        from invguide.diagnostics.operator import certify

        certificate = certify(self, shape=shape, x=x, seed=seed)
        if not quiet:
            print(certificate)  # noqa: T201
        return certificate

    def to_deepinv(self, sigma_y: float | None = None) -> Any:
        """Return a `deepinv.physics.Physics` with this operator and Gaussian noise of sigma_y (None: no noise)."""
        from invguide.adapters.operators import to_deepinv

        return to_deepinv(self, sigma_y)


class LinearOperator(Operator):
    """A linear map with its exact adjoint; the rest has general defaults that a subclass may replace."""

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """Return A* y, (B, *out_shape) -> (B, *in_shape), with <A x, y> = <x, A* y> in the real inner product."""

    # ---- algebra: `A @ B`, `A + B`, `A - B`, `2 * A`, `A / 2`, `-A`, `A.T`, and `A @ x` for A(x)

    @property
    def T(self) -> LinearOperator:
        """The adjoint A* as an operator."""
        from invguide.adapters.algebra import Adjoint

        return Adjoint(self)

    def __matmul__(self, other: Any) -> Any:
        from invguide.adapters.algebra import Product

        if isinstance(other, Tensor):
            return self(other)
        return Product(self, other) if isinstance(other, LinearOperator) else NotImplemented

    def __add__(self, other: Any) -> Any:
        from invguide.adapters.algebra import Sum

        return Sum(self, other) if isinstance(other, LinearOperator) else NotImplemented

    def __sub__(self, other: Any) -> Any:
        return self + -other if isinstance(other, LinearOperator) else NotImplemented

    def __mul__(self, factor: Any) -> Any:
        from invguide.adapters.algebra import Multiple

        return Multiple(self, factor) if isinstance(factor, int | float) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, factor: Any) -> Any:
        return self * (1 / factor) if isinstance(factor, int | float) else NotImplemented

    def __neg__(self) -> LinearOperator:
        return self * -1.0

    def svd(self, x: Tensor) -> SVD | None:
        """Return the singular value decomposition for signals like x (shape, dtype, device), or None if not cheap."""
        return None

    def row_norms(self, y: Tensor) -> Tensor | None:
        """Return |A* e_i| of every element of one measurement, shape and dtype of y[0], or None if not cheap."""
        return None

    def right_inverse(self, y: Tensor) -> Tensor | None:
        """Return an x that A maps to y, as a plausible change of a signal would be; None if there is no cheap one."""
        return None

    def solve(self, rhs: Tensor, ridge: Tensor | float) -> Tensor:
        """Return (A A* + ridge I)^-1 rhs; ridge > 0, scalar or (B,). Spectral where `svd` is known, else CG."""
        svd = self._svd_for(rhs)
        if svd is None:
            return conjugate_gradient(
                self._normal(rhs, ridge), rhs, preconditioner=self.preconditioner(rhs, ridge)
            )
        spectral = svd.U_adjoint(rhs)
        solution = svd.U(spectral / (svd.s**2 + per_sample(ridge, spectral.real)))
        if svd.s.numel() >= rhs[0].numel():
            return solution  # U reaches all of y
        return solution + (rhs - svd.U(spectral)) / per_sample(ridge, rhs.real)

    def _normal(self, rhs: Tensor, ridge: Tensor | float) -> Callable[[Tensor], Tensor]:
        damping = per_sample(ridge, rhs.real)
        return lambda v: self.forward(self.adjoint(v)) + damping * v

    def preconditioner(
        self, rhs: Tensor, ridge: Tensor | float
    ) -> Callable[[Tensor], Tensor] | None:
        """Return about (A A* + ridge I)^-1 for measurements like rhs (B, *out_shape), or None where nothing is cheap.

        A function of such measurements, linear, symmetric and positive definite, each sample on its own; `ridge` as
        for `solve`. Only the time that conjugate gradients take depends on how near it is.
        """
        return None

    def solve_within(self, rhs: Tensor, ridge: Tensor | float, error: Tensor) -> Tensor:
        """Return v near (A A* + ridge I)^-1 rhs, as near as a data step needs, which adds A* v to its centre.

        An operator without `svd` or a `solve` of its own stops where |residual| / (2 sqrt(ridge)), which bounds the
        error of A* v, is below `error`.

        Args:
            rhs: (B, *out_shape).
            ridge: Above 0, scalar or (B,).
            error: How far off A* v may be in each sample, Euclidean norm, (B,).
        """
        if type(self).solve is not LinearOperator.solve or self._svd_for(rhs) is not None:
            return self.solve(rhs, ridge)
        return conjugate_gradient(
            self._normal(rhs, ridge),
            rhs,
            preconditioner=self.preconditioner(rhs, ridge),
            enough=2 * error * torch.as_tensor(ridge, dtype=error.dtype, device=rhs.device).sqrt(),
        )

    def pinv(self, y: Tensor) -> Tensor:
        """Return the minimum-norm least-squares solution A^+ y. Exact with `svd`, else CG on A* A x = A* y.

        Directions whose singular value is below 1e-6 of the largest are left out. CG stops at a relative residual of
        1e-6 or after 500 iterations, which damps such directions too.
        """
        svd = self._svd_for(y)
        if svd is None:
            return conjugate_gradient(lambda v: self.adjoint(self.forward(v)), self.adjoint(y))
        kept = svd.s.abs() > 1e-6 * svd.s.abs().max()
        return svd.V(torch.where(kept, 1 / torch.where(kept, svd.s, 1), 0) * svd.U_adjoint(y))

    def _svd_for(self, y: Tensor) -> SVD | None:
        shape = self.input_shape(tuple(y.shape[1:]))
        return None if shape is None else self.svd(y.real.new_empty((1, *shape)))


def columns(operator: LinearOperator, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return A of each unit vector, the columns of its matrix: (n, *y_shape) for n numbers in x (*shape).

    One call for 256 of them; dtype and device are those of `like`.
    """
    n = torch.Size(shape).numel()
    unit = torch.eye(n, dtype=like.dtype, device=like.device).reshape(n, *shape)
    with torch.no_grad():
        return torch.cat([operator.forward(unit[i : i + 256]) for i in range(0, n, 256)])


def orthonormal_scale(operator: LinearOperator, x: Tensor, y: Tensor) -> float | None:
    """Return c > 0 where A* A = A A* = c^2 I, to rounding, on random signals like x (1, *shape) and y; else None.

    Four calls of the operator. A random signal keeps its direction under no other map.
    """
    if y.is_complex() or x.shape[1:].numel() != y.shape[1:].numel():
        return None
    source = torch.Generator().manual_seed(0)
    scale = 0.0  # until it is known
    for like, there, back in (
        (x, operator.forward, operator.adjoint),
        (y, operator.adjoint, operator.forward),
    ):
        probe = torch.randn(like.shape, generator=source, dtype=like.dtype).to(like.device)
        # Squares of large units would leave the range of single precision.
        image, size = back(there(probe)).double(), norm(probe.double())
        if not scale:
            scale = float(norm(image) / size) ** 0.5
            if not 0 < scale < float("inf"):
                return None
            if abs(scale - 1) < 100 * torch.finfo(like.dtype).eps:
                scale = 1.0
        error = norm(image / scale**2 - probe.double())
        if not bool((error <= 100 * torch.finfo(like.dtype).eps * size).all()):
            return None
    return scale


def multiple_of_identity(operator: Operator, x: Tensor) -> float | None:
    """Return c > 0 where A x = c x, to rounding, on a random signal like x (1, *shape); else None. One call."""
    source = torch.Generator().manual_seed(0)
    probe = torch.rand(x.shape, generator=source, dtype=x.dtype).to(x.device)
    image = operator(probe)
    if image.shape != probe.shape or image.is_complex():
        return None
    scale = float(inner(probe.double(), image.double()) / norm(probe.double()) ** 2)
    error = norm(image.double() - scale * probe.double())
    allowed = 100 * torch.finfo(x.dtype).eps * scale * norm(probe.double())
    return scale if 0 < scale < float("inf") and bool((error <= allowed).all()) else None


def check_batch(operator: Operator, x: Tensor, y: Tensor) -> None:
    """Raise ShapeError unless the operator kept the batch axis."""
    tensor = isinstance(y, Tensor)  # pyright: ignore[reportUnnecessaryIsInstance]  (users return anything)
    if not tensor or y.ndim == 0 or y.shape[0] != x.shape[0]:
        got = tuple(y.shape) if tensor else type(y).__name__
        raise ShapeError(
            f"{type(operator).__name__} was given {x.shape[0]} samples of shape {tuple(x.shape[1:])} and returned "
            f"{got}; expected a tensor whose first axis is the batch ({x.shape[0]}). Keep the batch axis in forward."
        )
