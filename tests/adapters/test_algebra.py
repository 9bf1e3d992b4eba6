"""Sums, products, multiples and adjoints of operators against their dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import invguide as ig
from invguide.adapters.algebra import Adjoint, Product
from invguide.errors import InputError
from invguide.forward_operator import LinearOperator
from invguide.operators import GaussianBlur, Inpainting, MotionBlur, SuperResolution

SHAPE = (1, 6, 8)
F64 = torch.float64
A, B, C = GaussianBlur(sigma=1.0), MotionBlur(length=3, angle=30), SuperResolution(factor=2)
# One expression, of operators and of their matrices.
EXPRESSIONS = {
    "A + B": lambda a, b, c: a + b,
    "A - B": lambda a, b, c: a - b,
    "C @ A": lambda a, b, c: c @ a,
    "3 * C": lambda a, b, c: 3 * c,
    "C / 4": lambda a, b, c: c / 4,
    "-A": lambda a, b, c: -a,
    "(2 * A - B).T @ B": lambda a, b, c: (2 * a - b).T @ b,
    "C @ (A + 2 * B)": lambda a, b, c: c @ (a + 2 * b),
}


def dense(operator: LinearOperator) -> np.ndarray:
    """Column by column."""
    x = torch.eye(48, dtype=F64).reshape(48, *SHAPE)
    return operator(x).flatten(1).T.numpy()


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_each_is_what_its_matrices_say(expression: str) -> None:
    made = EXPRESSIONS[expression]
    operator, expected = made(A, B, C), made(dense(A), dense(B), dense(C))
    assert np.abs(dense(operator) - expected).max() < 1e-12
    y = torch.randn(3, *operator(torch.zeros(1, *SHAPE, dtype=F64)).shape[1:], dtype=F64)
    adjoint = operator.adjoint(y).flatten(1).numpy()
    assert np.abs(adjoint - y.flatten(1).numpy() @ expected).max() < 1e-12
    ridge = torch.tensor([0.3, 1.0, 2.0], dtype=F64)
    solved = operator.solve(y, ridge).flatten(1).numpy()
    for row, damping, found in zip(y.flatten(1).numpy(), ridge.tolist(), solved, strict=True):
        gram = expected @ expected.T + damping * np.eye(len(expected))
        assert np.abs(found - np.linalg.solve(gram, row)).max() < 1e-5


def test_posteriors_under_a_made_operator_are_those_of_its_matrix() -> None:
    operator = 2 * (C @ A) - C
    prior = ig.priors.GaussianField(SHAPE)
    x = prior.sample(1, seed=0).double()
    y = operator(x) + 0.1
    result = ig.solve(
        y, operator, prior, sigma_y=0.2, solver="exact-posterior", dtype="float64", progress=False
    )
    matrix = dense(operator)
    blank = torch.eye(48, dtype=F64).reshape(48, *SHAPE)
    covariance = np.stack([prior_times(prior, v) for v in blank])
    gain = (
        covariance @ matrix.T @ np.linalg.inv(matrix @ covariance @ matrix.T + 0.04 * np.eye(12))
    )
    point = ig.solve(
        y,
        operator,
        prior,
        sigma_y=0.2,
        solver=ig.solvers.ExactPosterior(draw=False),
        dtype="float64",
        progress=False,
    ).mean
    assert np.abs(point.flatten().numpy() - gain @ y.flatten().numpy()).max() < 1e-5
    assert result.samples.isfinite().all()


def prior_times(prior: ig.priors.GaussianField, v: Tensor) -> np.ndarray:
    """Its covariance times v, from its denoiser: D(x; s) = C (C + s^2)^-1 x, so C = s^2 D (1 - D)^-1."""
    eye = torch.eye(48, dtype=F64).reshape(48, *SHAPE)
    d = prior.denoise(eye, 1.0).flatten(1).T.numpy()
    return np.linalg.solve((np.eye(48) - d).T, d.T).T @ v.flatten().numpy()


def test_multiples_know_what_their_operator_knows() -> None:
    double = 2 * A
    x = torch.zeros(1, *SHAPE, dtype=F64)
    svd, known = double.svd(x), A.svd(x)
    assert svd is not None
    assert known is not None
    assert torch.equal(svd.s, 2 * known.s)
    back = A.T.svd(x)
    assert back is not None
    v = torch.randn(1, *SHAPE, dtype=F64)
    assert torch.allclose(back.U(back.s * back.V_adjoint(v)), A.adjoint(v), atol=1e-12)
    mask = Inpainting(torch.arange(48).reshape(SHAPE) % 2 > 0)
    hidden = (3 * mask).observed()
    assert hidden is not None
    assert torch.equal(hidden, mask.mask)


def test_adjoints_turn_back_and_products_read_as_written() -> None:
    assert A.T.T is A
    assert isinstance(A.T, Adjoint)
    product = C @ A
    assert isinstance(product, Product)
    x = torch.rand(2, *SHAPE, dtype=F64)
    assert torch.equal(product @ x, C(A(x)))
    assert product.input_shape((1, 3, 4)) == SHAPE
    product.check(x=x[:1].float())


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(InputError, match="expected the same"):
        (A + C).forward(torch.zeros(1, *SHAPE))
    for wrong in (0.0, float("nan")):
        with pytest.raises(InputError, match="finite number"):
            _ = wrong * A
    with pytest.raises(TypeError):
        _ = A @ 3  # pyright: ignore[reportOperatorIssue]
    with pytest.raises(TypeError):
        _ = A + 1  # pyright: ignore[reportOperatorIssue]
