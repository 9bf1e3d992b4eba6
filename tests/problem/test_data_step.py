"""Inner solves of data steps: as exact as they say, in as few products as that takes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from invguide.forward_operator import LinearOperator
from invguide.likelihood import Likelihood
from invguide.numerics.linear import conjugate_gradient, inner
from invguide.operators import Blur, MotionBlur
from invguide.problem.proximal import ACCURACY, proximal

SIZE = 24


class Counted(MotionBlur):
    """Counts its forward calls."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def matrix_of(function: LinearOperator, size: tuple[int, ...]) -> Tensor:
    """Dense matrix of a map on images (1, h, w), float64."""
    pixels = torch.eye(size[0] * size[1], dtype=torch.float64).reshape(-1, 1, *size)
    return function(pixels).flatten(1).T


def scene(count: int, size: int) -> Tensor:
    """Edges, ramps and dots: signals with all frequencies, and something at the border, (count, 3, size, size)."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    image = torch.nn.functional.interpolate(coarse, (size, size), mode="nearest")
    image = image + 0.2 * torch.linspace(0, 1, size)
    return 0.8 * image + 0.05 * torch.randn(image.shape, generator=generator)


@pytest.mark.parametrize("padding", ["reflect", "valid"])
@pytest.mark.parametrize("ridge", [1e-3, 0.3])
def test_the_preconditioner_is_symmetric_positive_and_near_the_inverse(
    padding: str, ridge: float
) -> None:
    operator = MotionBlur(5, 30, padding).double()  # pyright: ignore[reportArgumentType]
    a = matrix_of(operator, (SIZE, SIZE))
    shape = operator(torch.zeros(1, 1, SIZE, SIZE, dtype=torch.float64)).shape
    pixels = torch.eye(len(a), dtype=torch.float64).reshape(-1, *shape[1:])
    p = operator.preconditioner(pixels, ridge)(pixels).flatten(1).T
    system = a @ a.T + ridge * torch.eye(len(a), dtype=torch.float64)
    assert torch.allclose(p, p.T, atol=1e-12 * float(p.abs().max()))
    assert float(torch.linalg.eigvalsh(p).min()) > 0
    root = torch.linalg.cholesky(p)
    spread = torch.linalg.eigvalsh(root.T @ system @ root)
    plain = torch.linalg.eigvalsh(system)
    # Away from the border, which so small a picture has everywhere, it is the inverse: many eigenvalues are one.
    assert float(((spread - 1).abs() < 0.1).double().mean()) > 0.4
    assert float(spread.max() / spread.min()) < float(plain.max() / plain.min())


@pytest.mark.parametrize("ridge", [1e-3, 0.3])
def test_solve_with_rows_of_their_own_ridge(ridge: float) -> None:
    kernel = torch.rand(5, 3, generator=torch.Generator().manual_seed(0)) + 0.1
    operator = Blur(kernel / kernel.sum()).double()
    a = matrix_of(operator, (SIZE, SIZE - 4))
    rhs = torch.randn(2, 1, SIZE, SIZE - 4, dtype=torch.float64)
    ridges = torch.tensor([ridge, 7 * ridge], dtype=torch.float64)
    found = operator.solve(rhs, ridges)
    for row, own, one in zip(rhs, ridges, found, strict=True):
        system = a @ a.T + own * torch.eye(len(a), dtype=torch.float64)
        exact = torch.linalg.solve(system, row.flatten())
        # A relative residual of 1e-6 times the condition of the system.
        assert float((one.flatten() - exact).norm()) < 1e-6 * float(rhs[0].norm() / own)


@pytest.mark.parametrize("accuracy", [0.02, 0.2])
@pytest.mark.parametrize("variance", [0.003, 0.3])
def test_a_data_step_is_off_by_no_more_than_it_says(accuracy: float, variance: float) -> None:
    operator, sigma_y = Counted(5, 30).double(), 0.03
    x = scene(2, SIZE).double()
    y = operator(x) + sigma_y * torch.randn(x.shape, dtype=x.dtype)
    centre = torch.full_like(x, 0.5)
    a = matrix_of(operator, (SIZE, SIZE))
    ridge = sigma_y**2 / variance
    system = a.T @ a + ridge * torch.eye(len(a), dtype=x.dtype)
    rhs = (y - operator(centre)).flatten(2) @ a
    exact = centre + torch.linalg.solve(system, rhs.flatten(0, 1).T).T.reshape(x.shape)
    likelihood = Likelihood(operator, y, sigma_y)
    operator.calls = 0
    close = proximal(likelihood, centre, variance)
    many, operator.calls = operator.calls, 0
    rough = proximal(likelihood, centre, variance, accuracy)
    assert float((close - exact).abs().max()) < 1e-4
    error = (rough - exact).square().mean((1, 2, 3)).sqrt()
    assert float(error.max()) <= accuracy * variance**0.5
    assert float(error.max()) > 1e-4 * accuracy * variance**0.5  # it did stop early
    assert operator.calls < many


def test_noise_that_varies_stops_early_too() -> None:
    operator = Counted(5, 30).double()
    x = scene(1, SIZE).double()
    sigma_y = 0.02 + 0.1 * torch.rand(x.shape, dtype=x.dtype)
    likelihood = Likelihood(operator, operator(x) + sigma_y, sigma_y)
    exact = proximal(likelihood, 0.5 + 0 * x, 0.1)
    operator.calls = 0
    rough = proximal(likelihood, 0.5 + 0 * x, 0.1, 0.05)
    assert 0 < float((rough - exact).square().mean().sqrt()) <= 0.05 * 0.1**0.5


@pytest.mark.slow
@pytest.mark.parametrize("sigma_y", [0.02, 0.05])
def test_products_of_a_data_step_behind_motion_blur(sigma_y: float) -> None:
    """Over the levels of HQS: at 1e-6 of |y - A x0|, without preconditioning, these are 53 and 29 on average."""
    operator = Counted(9, 30)
    x = scene(1, 96)
    generator = torch.Generator().manual_seed(0)
    y = operator(x) + sigma_y * torch.randn(x.shape, generator=generator)
    likelihood = Likelihood(operator, y, sigma_y)
    counts = []
    for level in torch.logspace(-0.456, -1.6, 15).tolist():  # 0.35 to 0.025, data units
        centre = x + 0.3 * level * torch.randn(x.shape, generator=generator)
        operator.calls = 0
        proximal(likelihood, centre, level**2 / 0.19, ACCURACY)
        counts.append(operator.calls - 1)  # the residual is one
    assert sum(counts) / len(counts) <= 15
    assert max(counts) <= 45


def test_a_solve_of_the_users_own_is_used() -> None:
    class Doubled(LinearOperator):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

        def adjoint(self, y: Tensor) -> Tensor:
            return 2 * y

        def solve(self, rhs: Tensor, ridge: Tensor | float) -> Tensor:
            return 100 * rhs  # not the solution: to see that it was asked

    y = torch.ones(1, 4)
    assert torch.equal(Doubled().solve_within(y, 0.1, torch.tensor([1e-3])), 100 * y)


def test_samples_stop_on_their_own_with_a_preconditioner() -> None:
    matrix = torch.diag(torch.logspace(0, 4, 30, dtype=torch.float64))
    matrix = matrix + 0.1 * torch.ones_like(matrix)
    rhs = torch.randn(2, 30, dtype=torch.float64) * torch.tensor([[1e3], [1.0]])
    settings = {
        "preconditioner": lambda v: v / matrix.diagonal(),
        "enough": torch.tensor([1e-3, 1e-9], dtype=torch.float64),
    }
    together = conjugate_gradient(lambda v: v @ matrix, rhs, tolerance=1e-12, **settings)
    settings["enough"] = settings["enough"][1:]
    alone = conjugate_gradient(lambda v: v @ matrix, rhs[1:], tolerance=1e-12, **settings)
    # Products of one row and of two are summed in different orders: 30 roundings, times a condition of 1e4.
    assert torch.allclose(together[1:], alone, rtol=0, atol=1e-9)
    residual = rhs - together @ matrix
    assert bool((inner(residual, residual).sqrt() <= torch.tensor([1e-3, 2e-9])).all())
