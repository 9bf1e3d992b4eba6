"""Operators one after the other."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from invguide.errors import InputError
from invguide.forward_operator import LinearOperator, Operator


class Composition(Operator):
    """Apply the operators in the order given: Composition(A, B)(x) = B(A(x)), as light meets them.

    A linear operator, with its adjoint, if all parts are; differentiable if all parts are.

    Args:
        operators: At least one, first applied first. Callables and deepinv physics go through `as_operator` first.

    Raises:
        InputError: No operators, or something else.

    Example:
        >>> import torch
        >>> from invguide.operators import GaussianBlur, SuperResolution
        >>> camera = Composition(GaussianBlur(sigma=1), SuperResolution(factor=2))
        >>> camera(torch.ones(1, 3, 8, 12)).shape, isinstance(camera, LinearOperator)
        (torch.Size([1, 3, 4, 6]), True)
    """

    def __new__(cls, *operators: Operator) -> Composition:
        linear = operators and all(isinstance(part, LinearOperator) for part in operators)
        return super().__new__(LinearComposition if cls is Composition and linear else cls)  # pyright: ignore[reportArgumentType]

    def __init__(self, *operators: Any) -> None:
        super().__init__()
        if not operators:
            raise InputError(
                "Composition() has no operators; expected at least one, first applied first"
            )
        for part in operators:
            if not isinstance(part, Operator):
                raise InputError(
                    f"Composition: {part!r} is no Operator; pass as_operator({part!r})"
                )
        self._parts = nn.ModuleList(operators)

    @property
    def parts(self) -> list[Any]:
        return list(self._parts)

    @property
    def differentiable(self) -> bool:
        return all(part.differentiable for part in self.parts)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x

    def observed(self) -> Tensor | None:
        return self.parts[-1].observed()

    def input_shape(self, y_shape: tuple[int, ...]) -> tuple[int, ...] | None:
        shape: tuple[int, ...] | None = y_shape
        for part in reversed(self.parts):
            shape = None if shape is None else part.input_shape(shape)
        return shape


class LinearComposition(Composition, LinearOperator):
    """What Composition(...) returns when all parts are linear."""

    def adjoint(self, y: Tensor) -> Tensor:
        for part in reversed(self.parts):
            y = part.adjoint(y)
        return y
