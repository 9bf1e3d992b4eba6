"""Ensemble algebra against dense matrices, whichever of members, entries and measurements are more."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from invguide.errors import DivergenceError
from invguide.sampling import ensemble
from invguide.sampling.ensemble import (
    correct,
    kalman_gain,
    normalised_gain,
    roll_out,
    roll_out_levels,
    significance,
)
from invguide.verify.targets import gaussian_2d

SIZES = [(20, 30, 7), (6, 30, 15), (40, 5, 50), (50, 4, 3)]  # members, entries, measurements


class Case(NamedTuple):
    x: Tensor  # (J, d)
    matrix: Tensor  # (m, d)
    residuals: Tensor  # (J, m), of matrix @ x
    covariance: Tensor  # (d, d) of the members, over their number


def case(members: int, d: int, m: int) -> Case:
    source = torch.Generator().manual_seed(members + d + m)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float64)

    x, matrix, y = randn(members, d), randn(m, d), randn(m)
    centred = x - x.mean(0)
    return Case(x, matrix, y - x @ matrix.mT, centred.mT @ centred / members)


@pytest.mark.parametrize("sizes", SIZES)
def test_the_ensemble_product_is_the_preconditioned_gradient(sizes: tuple[int, int, int]) -> None:
    """For linear maps X^T R~ r = -C A^T r for any J: the identity that makes EnKG derivative-free."""
    x, matrix, residuals, covariance = case(*sizes)
    strength = 0.7
    products = residuals @ (residuals - residuals.mean(0)).mT / len(x)
    expected = x + strength / products.norm() * residuals @ matrix @ covariance
    moved = correct(x, residuals, residuals, normalised_gain, strength)
    assert (moved - expected).abs().max() < 1e-10


@pytest.mark.parametrize("strength", [0.1, 10.0])
@pytest.mark.parametrize("sizes", SIZES)
def test_the_kalman_step_is_that_of_dense_matrices(
    sizes: tuple[int, int, int], strength: float
) -> None:
    x, matrix, residuals, covariance = case(*sizes)
    noise = torch.eye(len(matrix), dtype=x.dtype) / strength
    gain = covariance @ matrix.mT @ torch.linalg.inv(matrix @ covariance @ matrix.mT + noise)
    moved = correct(x, residuals, residuals, kalman_gain, strength)
    assert (moved - x - residuals @ gain.mT).abs().max() < 1e-10


def test_a_very_precise_measurement_in_few_members() -> None:
    """More measurements than members and noise of 1e-3, by singular vectors, which lose no digits."""
    x, _, residuals, _ = case(6, 30, 15)
    residuals = 1e3 * residuals
    centred = residuals - residuals.mean(0)
    U, s, Vh = torch.linalg.svd(centred, full_matrices=False)
    weights = (residuals @ Vh.mT) * (s / (s**2 + 6)) @ U.mT
    moved = correct(x, residuals, residuals, kalman_gain, 1.0)
    assert (moved - x + weights @ (x - x.mean(0))).abs().max() < 1e-9


@pytest.mark.parametrize("localised", [False, True])
def test_failed_members_are_left_out_and_move_with_the_mean(localised: bool) -> None:
    x, _, residuals, _ = case(20, 30, 7)
    broken = residuals.clone()
    broken[3], broken[11, 2] = float("nan"), float("inf")
    alive = torch.ones(20, dtype=torch.bool)
    alive[[3, 11]] = False
    moved = correct(x, broken, broken, kalman_gain, 2.0, localised=localised)
    alone = correct(
        x[alive], residuals[alive], residuals[alive], kalman_gain, 2.0, localised=localised
    )
    assert torch.allclose(moved[alive], alone, atol=1e-12)
    shift = (alone - x[alive]).mean(0)
    assert torch.allclose(moved[~alive], x[~alive] + shift, atol=1e-12)


def test_a_member_that_is_not_finite_stays_alone() -> None:
    x, _, residuals, _ = case(20, 30, 7)
    x[5, 0] = float("nan")
    moved = correct(x, residuals, residuals, kalman_gain, 1.0)
    assert moved[torch.arange(20) != 5].isfinite().all()


@pytest.mark.parametrize("left", [0, 1])
def test_fewer_than_two_survivors_is_an_error(left: int) -> None:
    x, _, residuals, _ = case(20, 30, 7)
    residuals[left:] = float("nan")
    with pytest.raises(DivergenceError, match=f"{left} of 20 members of the ensemble survived"):
        correct(x, residuals, residuals, kalman_gain, 1.0)


def test_a_collapsed_ensemble_stays_where_it_is() -> None:
    x, residuals = torch.ones(4, 3), torch.ones(4, 2)
    for gain in (kalman_gain, normalised_gain):
        for localised in (False, True):
            moved = correct(x, residuals, residuals, gain, 1.0, localised=localised)
            assert torch.equal(moved, x)


def test_inflation_widens_about_the_mean() -> None:
    x, _, residuals, _ = case(20, 30, 7)
    plain = correct(x, residuals, residuals, kalman_gain, 1.0)
    wide = correct(x, residuals, residuals, kalman_gain, 1.0, inflation=1.5)
    assert torch.allclose(wide.mean(0), plain.mean(0))
    assert torch.allclose(wide.std(0), 1.5 * plain.std(0))


def test_shapes_are_kept() -> None:
    x, _, residuals, _ = case(20, 30, 7)
    image = correct(x.reshape(20, 2, 3, 5), residuals, residuals, kalman_gain, 1.0)
    assert torch.equal(image.flatten(1), correct(x, residuals, residuals, kalman_gain, 1.0))


@pytest.mark.parametrize("size", [5, 20, 1000])
def test_significance_is_that_of_fishers_transform(size: int) -> None:
    r = torch.tensor([-0.9, -0.3, 0.01, 0.5, 0.99], dtype=torch.float64)
    e = 1 / math.sqrt(size - 3)
    error = (torch.tanh(torch.atanh(r) + e) - torch.tanh(torch.atanh(r) - e)) / 2
    expected = (r / error) ** 2 / (1 + (r / error) ** 2)
    assert torch.allclose(significance(r, size), expected, atol=1e-12)
    ends = significance(torch.tensor([0.0, 1.0, -1.0]), size)
    assert ends.tolist() == [0.0, 1.0, 1.0]


def test_localisation_lowers_the_error_of_a_small_ensemble(monkeypatch) -> None:
    """A field with correlation length 2 measured at every fourth point, by 40 members: error of the Kalman mean.

    The blocks of the product do not matter.
    """
    source = torch.Generator().manual_seed(0)
    place = torch.arange(64, dtype=torch.float64)
    covariance = torch.exp(-((place[:, None] - place) ** 2) / 8)
    root = torch.linalg.cholesky(covariance + 1e-6 * torch.eye(64))
    truth = root @ torch.randn(64, generator=source, dtype=torch.float64)
    seen = torch.arange(0, 64, 4)
    noise = 0.25 * torch.eye(16, dtype=torch.float64)
    exact = covariance[:, seen] @ torch.linalg.inv(covariance[seen][:, seen] + noise) @ truth[seen]
    errors = {False: 0.0, True: 0.0}
    for _ in range(20):
        x = torch.randn(40, 64, generator=source, dtype=torch.float64) @ root.mT
        residuals = (truth[seen] - x[:, seen]) / 0.5
        for localised in errors:
            moved = correct(x, residuals, residuals, kalman_gain, 1.0, localised=localised)
            errors[localised] += float((moved.mean(0) - exact).norm()) / 20
    monkeypatch.setattr(ensemble, "BLOCK", 16)
    assert torch.allclose(
        correct(x, residuals, residuals, kalman_gain, 1.0, localised=True), moved, atol=1e-12
    )
    print(errors, float(exact.norm()))
    # 0.27 and 0.37 of the norm measured; tapering C_xr instead of the gain gives 0.36.
    assert errors[True] < 0.8 * errors[False]


@pytest.mark.parametrize(("second_order", "tolerance"), [(False, 0.02), (True, 1e-3)])
def test_a_roll_out_is_the_probability_flow(second_order: bool, tolerance: float) -> None:
    """In closed form for a Gaussian: mean + C^1/2 (C + sigma^2)^-1/2 (x - mean)."""
    target = gaussian_2d()
    problem = target.problem()
    covariance = torch.tensor([[1.0, 0.6], [0.6, 0.5]], dtype=torch.float64)
    mean = torch.tensor([0.5, -0.3], dtype=torch.float64)
    values, vectors = torch.linalg.eigh(covariance)
    flow = vectors @ torch.diag((values / (values + 4)).sqrt()) @ vectors.mT
    x = torch.tensor([[3.0, -2.0], [0.0, 1.0]], dtype=torch.float64)
    exact = mean + (x - mean) @ flow
    ours = roll_out(problem, x, roll_out_levels(problem, 2.0, 100), second_order)
    assert (ours - exact).abs().max() < tolerance
    assert problem.counters.network == 2 * (199 if second_order else 100)
    assert torch.allclose(roll_out(problem, x, [2.0, 0.0]), problem.denoise(x, 2.0))
