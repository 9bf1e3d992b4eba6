"""Every public operator keeps the promises of `invguide.testing.check_operator`: one table, and planted mistakes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import invguide as ig
import invguide.operators
from every_operator import EVERY, SHAPE
from invguide.errors import ContractError, InputError
from invguide.forward_operator import SVD, LinearOperator, Operator
from invguide.operators import HDR, GaussianBlur, Inpainting, SuperResolution
from invguide.testing import check_operator

WHOLE = "norms are those of whole blocks, and this size is no multiple of one"
EXCEPTIONS: dict[str, dict[str, str]] = {
    "hdr-gamma": {"posterior mean": "the tone curve is taken as its secant"},
    "jpeg-coefficients": {"row norms": WHOLE},
    "jpeg-420-turned": {"row norms": WHOLE},
    "jpeg-luma": {"row norms": WHOLE},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_operator_keeps_its_promises(name: str):
    check_operator(EVERY[name], SHAPE, exceptions=EXCEPTIONS.get(name))


@pytest.mark.parametrize(
    "operator",
    [
        GaussianBlur(0.8) + Inpainting.random(SHAPE, 0.4, seed=3),
        2 * SuperResolution(2),
        SuperResolution(2) @ GaussianBlur(0.8),
        Inpainting.random(SHAPE, 0.4, seed=3).T,
    ],
    ids=lambda operator: type(operator).__name__,
)
def test_sums_products_and_transposes_keep_their_promises(operator: LinearOperator):
    check_operator(operator, SHAPE)


def test_every_public_operator_is_in_the_table():
    for name in ig.operators.__all__:
        kind = getattr(ig.operators, name)
        assert any(isinstance(operator, kind) for operator in EVERY.values()), name


@pytest.mark.parametrize("name", EVERY)
def test_moved_to_another_type_it_measures_the_same(name: str):
    """Parameters in single precision are off by 6e-8 each, and kernels by as much in their sums."""
    x = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    usual = EVERY[name](x)
    for dtype in (torch.float64, torch.float32):
        moved = copy.deepcopy(EVERY[name]).to(dtype)(x)
        assert moved.dtype == torch.float64
        assert float((moved - usual).norm() / usual.norm()) < 1e-6


# ---- planted mistakes, in a map of 4 x 5 pictures


class Tilt(LinearOperator):
    """A x = M x, M the same for every row of a picture; a picture of two more columns is measured."""

    matrix: Tensor

    def __init__(self) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(2)
        self.register_buffer("matrix", torch.randn(7, 5, generator=source, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.mT.to(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return y @ self.matrix.to(y)

    def input_shape(self, y_shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*y_shape[:-1], 5)


def in_place(self: Tilt, x: Tensor) -> Tensor:
    with torch.no_grad():
        return Tilt.forward(self, x.mul_(1.5))


def flipped_svd(self: Tilt, x: Tensor) -> SVD:
    U, s, V = torch.linalg.svd(self.matrix.to(x), full_matrices=False)
    return SVD(
        s.expand(*x.shape[1:-1], 5),
        lambda z: z @ U.mT,
        lambda y: y @ U,
        lambda z: -(z @ V),
        lambda x: x @ V.mT,
    )


def coupled_pinv(self: Tilt, y: Tensor) -> Tensor:
    return LinearOperator.pinv(self, y) * (1 + 0.01 * y.mean())


def padded(self: Tilt, x: Tensor) -> Tensor:
    """Whatever the width."""
    return Tilt.forward(self, torch.nn.functional.pad(x, (0, 5 - x.shape[-1])))


SMALL = (1, 4, 5)
MISTAKES: list[tuple[str, str, dict[str, Any]]] = [
    ("runs", "first axis must stay 3", {"forward": lambda self, x: x[:1]}),
    ("finite", "NaN or infinite", {"forward": lambda self, x: Tilt.forward(self, x).log()}),
    ("input unchanged", "changed in place", {"forward": in_place}),
    (
        "deterministic",
        "relative difference",
        {"forward": lambda self, x: Tilt.forward(self, x) * (1 + 0.01 * torch.rand(1))},
    ),
    (
        "rows independent",
        "relative difference",
        {"forward": lambda self, x: Tilt.forward(self, x) / x.norm()},
    ),
    ("linear", "relative defect", {"forward": lambda self, x: Tilt.forward(self, x) + 1.0}),
    (
        "differentiable",
        "does not reach x",
        {"forward": lambda self, x: Tilt.forward(self, x.detach())},
    ),
    ("adjoint", "<u,A", {"adjoint": lambda self, y: -Tilt.adjoint(self, y)}),
    ("svd", "relative error", {"svd": flipped_svd}),
    ("solve", "relative residual", {"solve": lambda self, rhs, ridge: rhs / ridge}),
    ("inverse rows", "pinv of a batch", {"pinv": coupled_pinv}),
    (
        "inverse rows",
        "adjoint changes its input",
        {"adjoint": lambda self, y: Tilt.adjoint(self, y) + 0 * y.mul_(1 + 1e-12).sum()},
    ),
    (
        "types",
        "in single precision",
        {
            "forward": lambda self, x: (
                Tilt.forward(self, x) * (1.001 if x.dtype == torch.float32 else 1)
            )
        },
    ),
    (
        "types",
        "forward returns torch.float64",
        {"forward": lambda self, x: x.double() @ self.matrix.mT.double()},
    ),
    (
        "input shape",
        r"input_shape\(\(1, 4, 7\)\) is",
        {"input_shape": lambda self, y_shape: y_shape},
    ),
    ("wrong shapes", "is measured as", {"forward": padded}),
    ("row norms", "off the largest", {"row_norms": lambda self, y: torch.ones_like(y[0])}),
    (
        "right inverse",
        "off y",
        {"right_inverse": lambda self, y: 1.01 * LinearOperator.pinv(self, y)},
    ),
]


def planted(**body: Any) -> Operator:
    return type("Planted", (Tilt,), {"__doc__": Tilt.__doc__, **body})()


def test_without_a_mistake_nothing_is_said():
    check_operator(planted(), SMALL)
    check_operator(planted().float(), x=torch.rand(2, *SMALL))


@pytest.mark.parametrize(("promise", "text", "body"), MISTAKES)
def test_planted_mistakes_are_named(promise: str, text: str, body: dict[str, Any]):
    with pytest.raises(ContractError, match=text) as caught:
        check_operator(planted(**body), SMALL)
    assert caught.value.promise == promise, caught.value
    assert str(caught.value).startswith("Planted() breaks the promise")


@pytest.mark.parametrize(
    ("mistake", "factor"),
    [
        (lambda x, mean: x, r"A'\* \(y - A x\)"),
        (lambda x, mean: mean + 0.02, "1"),
        (lambda x, mean: x + 1.3 * (mean - x), r"E\[z | y\] - x"),
    ],
)
def test_planted_posterior_means_are_named(mistake: Any, factor: str):
    """Of a clipped picture: y ignored, a bias, and a step that is too long."""

    def posterior_mean(self: HDR, x: Tensor, *told: Tensor) -> Tensor:
        return mistake(x, HDR.posterior_mean(self, x, *told))

    operator = type("Planted", (HDR,), {"posterior_mean": posterior_mean})()
    with pytest.raises(ContractError, match=f"posterior mean.* times {factor} is"):
        check_operator(operator, (1, 8, 8))


def test_what_time_left_out_is_looked_at(monkeypatch: pytest.MonkeyPatch):
    """`check` takes ten seconds at most; a contract is no matter of time."""
    monkeypatch.setattr("invguide.diagnostics.operator.Examination.seconds", 0.0)
    with pytest.raises(ContractError, match="'adjoint'"):
        check_operator(planted(adjoint=lambda self, y: -Tilt.adjoint(self, y)), SMALL)


def test_exceptions_and_arguments():
    with pytest.raises(ContractError, match="keeps the promise 'svd'"):
        check_operator(planted(), SMALL, exceptions={"svd": "none"})
    with pytest.raises(InputError, match="no promise 'adjont'; did you mean 'adjoint'"):
        check_operator(planted(), SMALL, exceptions={"adjont": "none"})
    with pytest.raises(InputError, match="either shape"):
        check_operator(planted())
