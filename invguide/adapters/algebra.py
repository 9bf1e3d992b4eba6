"""Sums, products, multiples and adjoints of linear operators: what `A + B`, `A @ B`, `2 * A` and `A.T` are."""

from __future__ import annotations

from torch import Tensor

from invguide.errors import InputError
from invguide.forward_operator import SVD, LinearOperator


class Product(LinearOperator):
    """A B: x -> A(B(x)), as `A @ B`; `operators.Composition(B, A)` is the same map, for parts of any kind.

    Args:
        outer: A, applied last.
        inner: B, applied first.
    """

    def __init__(self, outer: LinearOperator, inner: LinearOperator) -> None:
        super().__init__()
        self.outer, self.inner = outer, inner

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x))

    def adjoint(self, y: Tensor) -> Tensor:
        return self.inner.adjoint(self.outer.adjoint(y))

    def observed(self) -> Tensor | None:
        return self.outer.observed()

    def input_shape(self, y_shape: tuple[int, ...]) -> tuple[int, ...] | None:
        between = self.outer.input_shape(y_shape)
        return None if between is None else self.inner.input_shape(tuple(between))

    def rows(self, index: Tensor) -> Product:
        return Product(_linear(self.outer.rows(index)), _linear(self.inner.rows(index)))


class Sum(LinearOperator):
    """A + B: x -> A(x) + B(x), of one shape.

    Args:
        first, second: The terms.
    """

    def __init__(self, first: LinearOperator, second: LinearOperator) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.first(x), self.second(x)
        if one.shape != other.shape:
            raise InputError(
                f"{type(self.first).__name__} + {type(self.second).__name__}: their measurements have the shapes "
                f"{tuple(one.shape[1:])} and {tuple(other.shape[1:])}; expected the same"
            )
        return one + other

    def adjoint(self, y: Tensor) -> Tensor:
        return self.first.adjoint(y) + self.second.adjoint(y)

    def observed(self) -> Tensor | None:
        first, second = self.first.observed(), self.second.observed()
        return None if first is None or second is None else first | second

    def input_shape(self, y_shape: tuple[int, ...]) -> tuple[int, ...] | None:
        first, second = self.first.input_shape(y_shape), self.second.input_shape(y_shape)
        return second if first is None else first

    def rows(self, index: Tensor) -> Sum:
        return Sum(_linear(self.first.rows(index)), _linear(self.second.rows(index)))


class Multiple(LinearOperator):
    """c A: x -> c A(x), with whatever A can solve.

    Args:
        operator: A.
        factor: c, not 0.
    """

    def __init__(self, operator: LinearOperator, factor: float) -> None:
        super().__init__()
        if not 0 < abs(factor) < float("inf"):
            raise InputError(
                f"a multiple of an operator by {factor:g}; expected a finite number, not 0"
            )
        self.operator, self.factor = operator, float(factor)

    def extra_repr(self) -> str:
        return f"factor={self.factor:g}"

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.operator(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return self.factor * self.operator.adjoint(y)

    def observed(self) -> Tensor | None:
        return self.operator.observed()

    def input_shape(self, y_shape: tuple[int, ...]) -> tuple[int, ...] | None:
        return self.operator.input_shape(y_shape)

    def rows(self, index: Tensor) -> Multiple:
        return Multiple(_linear(self.operator.rows(index)), self.factor)

    def svd(self, x: Tensor) -> SVD | None:
        svd = self.operator.svd(x)
        return None if svd is None else svd._replace(s=self.factor * svd.s)

    def row_norms(self, y: Tensor) -> Tensor | None:
        norms = self.operator.row_norms(y)
        return None if norms is None else abs(self.factor) * norms

    def right_inverse(self, y: Tensor) -> Tensor | None:
        return self.operator.right_inverse(y / self.factor)

    def solve(self, rhs: Tensor, ridge: Tensor | float) -> Tensor:
        return self.operator.solve(rhs, ridge / self.factor**2) / self.factor**2


class Adjoint(LinearOperator):
    """A*: y -> A*(y), as `A.T`.

    Args:
        operator: A.
    """

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__()
        self.operator = operator

    @property
    def T(self) -> LinearOperator:
        return self.operator

    def forward(self, x: Tensor) -> Tensor:
        return self.operator.adjoint(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return self.operator(y)

    def rows(self, index: Tensor) -> Adjoint:
        return Adjoint(_linear(self.operator.rows(index)))

    def svd(self, x: Tensor) -> SVD | None:
        shape = self.operator.input_shape(tuple(x.shape[1:]))
        svd = None if shape is None else self.operator.svd(x.new_empty((1, *shape)))
        return None if svd is None else SVD(svd.s, svd.V, svd.V_adjoint, svd.U, svd.U_adjoint)


def _linear(operator: object) -> LinearOperator:
    assert isinstance(operator, LinearOperator)  # rows of a linear operator are one
    return operator
