"""Stacks of physics of deepinv: one operator whose measurement is the parts after each other."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from invguide.adapters.deepinv_noise import stacked_law
from invguide.errors import InputError
from invguide.forward_operator import LinearOperator, Operator


class DeepinvStack(Operator):
    """Several physics of one x: their measurements flattened and joined, complex ones as pairs of real numbers."""

    def __init__(self, parts: Sequence[Operator]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self._shapes: list[tuple[tuple[int, ...], bool]] | None = None
        laws = [getattr(part, "noise", None) for part in self.parts]
        self.noise = stacked_law(laws, self._sizes)

    def _sizes(self) -> list[int] | None:
        if self._shapes is None:
            return None
        return [torch.Size(shape).numel() * (2 if pairs else 1) for shape, pairs in self._shapes]

    def join(self, y: Any) -> Tensor:
        """Return the measurements of the parts, a TensorList or sequence of tensors, as one (B, m)."""
        parts = list(y)
        if len(parts) != len(self.parts) or not all(isinstance(part, Tensor) for part in parts):
            raise InputError(
                f"y has {len(parts)} parts for {len(self.parts)} physics of the stack; expected one tensor for each"
            )
        self._shapes = [(tuple(part.shape[1:]), part.is_complex()) for part in parts]
        return torch.cat([_flat(part) for part in parts], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.join([part(x) for part in self.parts])

    def rows(self, index: Tensor) -> Operator:
        parts = [part.rows(index) for part in self._operators]
        if all(new is old for new, old in zip(parts, self._operators, strict=True)):
            return self
        stack = copy(self)
        stack._modules = {**self._modules, "parts": nn.ModuleList(parts)}
        return stack

    @property
    def _operators(self) -> list[Any]:
        return list(self.parts)

    def input_shape(self, y_shape: tuple[int, ...]) -> tuple[int, ...] | None:
        for i, part in enumerate(self._operators):
            known = part.input_shape(() if self._shapes is None else self._shapes[i][0])
            if known is not None:
                return known
        return None

    def identity_parts(self) -> Any:
        return {"parts": self._operators}

    def extra_repr(self) -> str:
        return " + ".join(part.extra_repr() for part in self._operators)


class DeepinvLinearStack(DeepinvStack, LinearOperator):
    """A stack of linear physics: A* y is the sum of the adjoints of the parts."""

    def adjoint(self, y: Tensor) -> Tensor:
        if self._shapes is None:
            known = self.input_shape(tuple(y.shape[1:]))
            if known is None:
                raise InputError(
                    f"{self} does not know the shapes of its parts yet; call it once on an x"
                )
            self.forward(y.new_zeros(1, *known))
        sizes = self._sizes()
        assert sizes is not None
        assert self._shapes is not None
        pieces = y.split(sizes, 1)
        found = [
            part.adjoint(_shaped(piece, *kind))
            for part, piece, kind in zip(self._operators, pieces, self._shapes, strict=True)
        ]
        return torch.stack(found).sum(0)


def _flat(part: Tensor) -> Tensor:
    return (torch.view_as_real(part.resolve_conj()) if part.is_complex() else part).flatten(1)


def _shaped(piece: Tensor, shape: tuple[int, ...], pairs: bool) -> Tensor:
    if not pairs:
        return piece.reshape(len(piece), *shape)
    return torch.view_as_complex(piece.reshape(len(piece), *shape, 2).contiguous())
