"""Units do not matter: y, sigma_y and the operator times c give the same answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import invguide as ig
from invguide.api import make_solver
from invguide.forward_operator import LinearOperator
from invguide.numerics.linear import conjugate_gradient
from invguide.operators import GaussianBlur, Identity, Inpainting
from invguide.solver import Solver
from small_runs import FEW, MEASURING, small_prior

SHAPE = (1, 6, 6)
UNITS = (1e-12, 1e-6, 1e6, 1e12)


class In(LinearOperator):
    """An operator in other units, without its decomposition."""

    def __init__(self, operator: LinearOperator, unit: float) -> None:
        super().__init__()
        self.operator, self.unit = operator, unit

    def forward(self, x: Tensor) -> Tensor:
        return self.unit * self.operator(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return self.unit * self.operator.adjoint(y)

    def observed(self) -> Tensor | None:
        return self.operator.observed()


def answer(
    solver: Solver[Any], operator: LinearOperator, unit: float, dtype: torch.dtype
) -> Tensor:
    source = torch.Generator().manual_seed(0)
    x = 0.4 * torch.randn(1, *SHAPE, generator=source, dtype=torch.float64)
    y = operator(x) + 0.1 * torch.randn(operator(x).shape, generator=source, dtype=torch.float64)
    result = ig.solve(
        (unit * y).to(dtype),
        In(operator, unit),
        small_prior(dtype),
        sigma_y=0.1 * unit,
        solver=solver,
        shape=SHAPE,
        dtype=dtype,
        progress=False,
    )
    return result.samples[0]


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MEASURING)
def test_units_of_the_measurement_do_not_matter(name: str) -> None:
    solver = make_solver(name, **FEW.get(name, {"num_steps": 12}))
    operator = Identity() if solver.requires.orthonormal else GaussianBlur(sigma=0.7)
    plain = answer(solver, operator, 1.0, torch.float64)
    for unit in UNITS:
        assert distance(answer(solver, operator, unit, torch.float64), plain) < 1e-6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MEASURING)
def test_units_do_not_matter_in_single_precision(name: str) -> None:
    solver = make_solver(name, **FEW.get(name, {"num_steps": 12}))
    operator = Identity() if solver.requires.orthonormal else GaussianBlur(sigma=0.7)
    plain = answer(solver, operator, 1.0, torch.float32)
    for unit in UNITS:
        d = distance(answer(solver, operator, unit, torch.float32), plain)
        print(name, unit, d)
        assert d < 1e-2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "operator", "settings"),
    [
        ("HQS", Inpainting(torch.arange(36).reshape(SHAPE) % 3 > 0), {"num_steps": 12}),
        ("auto", Identity(), {}),
    ],
)
def test_units_do_not_matter_to_starts_and_choices(
    name: str, operator: LinearOperator, settings: dict[str, Any]
) -> None:
    solver: Any = name if name == "auto" else make_solver(name, **settings)
    plain = answer(solver, operator, 1.0, torch.float64)
    for unit in UNITS:
        assert distance(answer(solver, operator, unit, torch.float64), plain) < 1e-6


def test_conjugate_gradients_take_any_unit_in_single_precision() -> None:
    source = torch.Generator().manual_seed(0)
    root = torch.randn(8, 8, generator=source, dtype=torch.float64)
    matrix, rhs = root @ root.T + torch.eye(8), torch.randn(2, 8, generator=source).double()
    exact = torch.linalg.solve(matrix, rhs.T).T
    for unit in (1e-24, 1.0, 1e24):  # of the map; A A* has that of A squared
        small = (unit * matrix).float()
        found = conjugate_gradient(lambda v, m=small: v @ m.T, (unit**0.5 * rhs).float())
        assert torch.allclose(found.double() * unit**0.5, exact, rtol=1e-4, atol=1e-5)
