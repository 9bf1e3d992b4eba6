"""Metrics against formulas written out here, and against samples whose law is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

import invguide as ig
from invguide.diagnostics.metrics import calibration, compare, psnr, rmse, ssim
from invguide.errors import ShapeError
from invguide.operators import Identity
from invguide.result import Result
from invguide.solvers import DPS


def result_of(samples: torch.Tensor, lost: tuple[tuple[int, int], ...] = ()) -> Result:
    b, s = samples.shape[:2]
    status = [["dropped: test" if (i, j) in lost else "ok" for j in range(s)] for i in range(b)]
    for i, j in lost:
        samples[i, j] = float("nan")
    nothing = torch.full((b, s), float("nan"))
    return Result(samples, nothing, nothing, status, 0.0, 0.0, {})


def test_psnr_by_hand_and_after_clamping():
    truth = torch.tensor([[[[0.0, 1.0]]], [[[0.5, 0.5]]]])
    x = torch.tensor([[[[-3.0, 0.8]]], [[[0.6, 0.3]]]])
    expected = [-10 * math.log10(0.2**2 / 2), -10 * math.log10((0.1**2 + 0.2**2) / 2)]
    assert psnr(x, truth).tolist() == pytest.approx(expected, abs=1e-4)


def ssim_by_hand(x: np.ndarray, y: np.ndarray) -> float:
    """Wang et al. 2004, eq. 13, of one channel; a window of radius 5 that stays inside."""

    def mean(a: np.ndarray) -> np.ndarray:
        return gaussian_filter(a, 1.5, truncate=5 / 1.5)[5:-5, 5:-5]

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mx * my + c1) * (2 * cov + c2)
    return float((top / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())


def test_ssim_by_hand():
    truth = torch.rand(2, 3, 24, 20)
    x = (truth + torch.tensor([0.05, 0.3]).reshape(2, 1, 1, 1) * torch.randn_like(truth)).clamp(
        0, 1
    )
    pairs = zip(x.double().numpy(), truth.double().numpy(), strict=True)
    expected = [
        np.mean([ssim_by_hand(a, b) for a, b in zip(*pair, strict=True)]) for pair in pairs
    ]
    assert ssim(x, truth).tolist() == pytest.approx(expected, abs=2e-4)
    assert ssim(truth, truth).tolist() == pytest.approx([1, 1], abs=1e-5)
    assert ssim(x[..., :8, :8], truth[..., :8, :8]).isfinite().all()


def test_rmse_counts_the_modulus():
    assert rmse(torch.tensor([[3 + 4j, 0]]), torch.zeros(1, 2)).item() == pytest.approx(
        math.sqrt(12.5)
    )


@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.parametrize("claimed", [1.0, 0.5])
def test_calibration_of_samples_from_the_posterior(count: int, claimed: float):
    """Truth and samples from one law give 1; samples of half the spread around the right mean give about 2."""
    centre = torch.randn(1, 20000)
    samples = centre + claimed * torch.randn(1, count, 20000)
    truth = centre + torch.randn(1, 20000)
    expected = math.sqrt((1 + claimed**2 / count) / (claimed**2 * (1 + 1 / count)))
    assert calibration(samples, truth).item() == pytest.approx(expected, rel=0.03)


def test_compare_images():
    truth = torch.rand(2, 3, 16, 16)
    samples = (truth[:, None] + 0.1 * torch.randn(2, 4, 3, 16, 16)).clamp(0, 1)
    metrics = compare(result_of(samples), truth)
    assert {k: tuple(v.shape) for k, v in metrics.items()} == {
        "psnr": (2, 4),
        "psnr_mean": (2,),
        "ssim_mean": (2,),
        "calibration": (2,),
    }
    error = (samples[1, 2] - truth[1]).square().mean().item()
    assert metrics["psnr"][1, 2].item() == pytest.approx(-10 * math.log10(error), abs=1e-3)
    assert (metrics["psnr_mean"] > metrics["psnr"].amax(1)).all()


def test_compare_leaves_lost_samples_out():
    truth = torch.rand(1, 3, 16, 16)
    samples = truth[:, None] + 0.1 * torch.randn(1, 3, 3, 16, 16)
    kept = compare(result_of(samples[:, :2].clone()), truth)
    metrics = compare(result_of(samples.clone(), lost=((0, 2),)), truth)
    assert metrics["psnr"].isnan().tolist() == [[False, False, True]]
    for name in ("psnr_mean", "calibration"):
        assert metrics[name].item() == pytest.approx(kept[name].item(), rel=1e-5)


def test_compare_what_is_no_image():
    truth = torch.zeros(2, 5)
    metrics = compare(result_of(torch.ones(2, 1, 5)), truth)
    assert set(metrics) == {"rmse", "rmse_mean"}
    assert metrics["rmse"].tolist() == [[1.0], [1.0]]


def test_compare_refuses_another_shape():
    with pytest.raises(ShapeError, match=r"truth has shape \(5,\); expected .* \(2, 5\)"):
        compare(result_of(torch.ones(2, 1, 5)), torch.zeros(5))


def test_solve_adds_metrics_only_where_a_truth_is_given():
    prior = ig.priors.Gaussian(torch.zeros(4), torch.eye(4))
    arguments = (torch.ones(1, 4), Identity(), prior)
    settings = {"sigma_y": 0.5, "solver": DPS(num_steps=3), "num_samples": 2, "progress": False}
    assert ig.solve(*arguments, **settings).metrics == {}
    metrics = ig.solve(*arguments, **settings, truth=torch.ones(1, 4)).metrics
    assert set(metrics) == {"rmse", "rmse_mean", "calibration"}
