"""What the caller has switched on around a run: inference mode, devices; and collapsed ensembles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import invguide as ig
from invguide import solvers
from invguide.errors import CompatibilityError, InputError
from invguide.result import Result
from invguide.solver import Solver

PRIOR = ig.priors.Gaussian(torch.full((6,), 0.5), 0.04 * torch.eye(6))
MATRIX = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
Y = torch.rand(1, 4, generator=torch.Generator().manual_seed(2))
QUIET: dict[str, Any] = {"progress": False, "seed": 0}


def measure(x: Tensor) -> Tensor:
    return x @ MATRIX.T.to(x)


def run(name: str, y: Tensor, sigma_y: Any) -> Tensor:
    operator = ig.as_operator(measure, linear=True, shape=(6,))
    return ig.solve(y, operator, PRIOR, sigma_y=sigma_y, solver=name, **QUIET).samples


def takes_measurements(kind: type[Solver[Any]]) -> bool:
    own = kind.__module__.startswith("invguide.")
    return (
        own and kind.requires.target in ("likelihood", "either") and kind.requires.reward is None
    )


assert solvers.DPS  # the import fills the registry
SOLVERS = sorted(name for name, kind in Solver.registry.items() if takes_measurements(kind))


def test_there_are_solvers():
    assert len(SOLVERS) > 12


@pytest.mark.slow
@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_run_inside_inference_mode(name: str):
    try:
        expected = run(name, Y, 0.1)
    except CompatibilityError:
        pytest.skip("not for this problem")
    with torch.inference_mode():
        made_here = Y + 0.0, torch.tensor(0.1)
        assert made_here[0].is_inference()
        samples = run(name, *made_here)
    assert torch.equal(samples, expected)
    assert not samples.is_inference()


def test_networks_made_inside_inference_mode_can_be_guided():
    def solved() -> Tensor:
        torch.manual_seed(0)
        net = torch.nn.Linear(6, 6)
        prior = Linear(net)
        operator = torch.nn.Linear(6, 4, bias=False).requires_grad_(False)
        return ig.solve(Y, operator, prior, sigma_y=0.1, solver="DPS", **QUIET).samples

    expected = solved()
    with torch.inference_mode():
        assert torch.equal(solved(), expected)


class Linear(ig.Prior):
    """D(x) = x / (1 + sigma^2) after a network that hardly matters."""

    shape = (6,)
    sigma_min, sigma_max, sigma_data = 0.01, 10.0, 1.0

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
        return (x + 0.01 * self.net(x)) / (1 + torch.as_tensor(sigma).reshape(-1, 1) ** 2)


def test_a_reward_is_followed_inside_inference_mode():
    with torch.inference_mode():
        result = ig.guide(PRIOR, lambda x: -50 * (x - 0.8).square().sum(1), solver="DPS", **QUIET)
    # normal prior and quadratic reward: mean 0.5 + 0.3 * 4 / 5 and a deviation of 0.09
    assert (result.mean - 0.74).abs().max() < 0.4


def test_the_meta_device_is_refused_and_the_prior_kept():
    prior = ig.priors.Gaussian(torch.full((6,), 0.5), 0.04 * torch.eye(6))
    with pytest.raises(InputError, match="device 'meta' holds shapes and no numbers"):
        ig.solve(Y, measure, prior, sigma_y=0.1, device="meta", **QUIET)
    assert prior.device.type == "cpu"
    assert torch.equal(prior.mean, torch.full((6,), 0.5).double())


# ---- one sample that has all the weight


def weighted(log_weights: list[float]) -> Result:
    n = len(log_weights)
    samples = torch.tensor([[[0.0], [1.0], [3.0]]])[:, :n].double()
    chi2 = torch.ones(1, n, dtype=torch.float64)
    logits = torch.tensor([log_weights], dtype=torch.float64)
    return Result(samples, chi2, chi2, [["ok"] * n], 1.0, 0.0, {}, log_weights=logits)


def test_std_has_a_limit_where_one_sample_takes_all_weight():
    for shift in (20.0, 60.0, 500.0, 5000.0):
        result = weighted([shift, 0.0, 1.0])
        others = torch.tensor([1.0, torch.e]).double()
        # The unbiased estimate is sum_ij w_i w_j (x_i - x_j)^2 / 2 over sum_ij w_i w_j, i != j.
        expected = ((others * torch.tensor([1.0, 9.0])).sum() / others.sum() / 2).sqrt()
        assert result.std.item() == pytest.approx(expected.item(), rel=1e-4)
        assert "one has all the weight" in result.diagnosis
    assert "weight" not in weighted([0.0, 0.0, 1.0]).diagnosis


def test_std_of_one_sample_is_unknown():
    assert weighted([0.0]).std.isnan().all()
    assert weighted([0.0, -torch.inf]).std.isnan().all()
