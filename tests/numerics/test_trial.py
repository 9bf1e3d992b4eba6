"""What is found out about foreign code before it is used: gradients, adjoints, inputs, modes of networks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import invguide as ig
from invguide.adapters.operators import as_operator
from invguide.errors import CompatibilityError, InputError
from invguide.forward_operator import LinearOperator, Operator
from invguide.likelihood import Likelihood
from invguide.numerics.trial import CUT, ZERO, gradient_fault
from invguide.prior import Prior
from invguide.reward import Reward, as_reward
from invguide.solver import Solver
from invguide.solvers import HQS

PRIOR = ig.priors.Gaussian(torch.full((6,), 0.5), 0.04 * torch.eye(6))
QUIET: dict[str, Any] = {"progress": False, "seed": 0}


def signals(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


DEAD: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "rounds": (lambda x: (x * 8).round() / 8, ZERO),
    "compares": (lambda x: torch.sign(x - 0.5), ZERO),
    "counts": (lambda x: (x > 0.5).to(x) + 0 * x, ZERO),
    "detached": (lambda x: x.detach() ** 2, CUT),
    "no_grad": (torch.no_grad()(lambda x: x**2), CUT),
    "no_grad view": (torch.no_grad()(lambda x: x[:, ::2]), CUT),
}


@pytest.mark.parametrize("name", DEAD)
def test_gradients_of_no_use_are_found(name: str):
    function, fault = DEAD[name]
    assert gradient_fault(function, signals(2, 6)) == fault
    operator: Any = as_operator(function)
    operator(signals(2, 6))
    assert not operator.differentiable
    assert fault in operator.fault
    reward: Any = as_reward(lambda x: function(x).sum(1))
    reward(signals(2, 6))
    assert not reward.differentiable
    assert fault in reward.fault


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.clamp(0, 1),
        lambda x: (x - 5).clamp_min(0),  # flat at every signal of data size
        lambda x: x + (x.round() - x).detach(),  # a straight-through gradient is one
        lambda x: x[:, :1],
        lambda x: x.sqrt(),  # not finite below 0, which is another fault
    ],
)
def test_gradients_of_use_are_kept(function: Callable[[Tensor], Tensor]):
    assert gradient_fault(function, signals(2, 6)) is None


def test_auto_takes_a_black_box_method_and_others_say_why():
    function = DEAD["rounds"][0]
    y = function(signals(1, 6))
    result = ig.solve(y, function, PRIOR, sigma_y=0.05, num_samples=64, **QUIET)
    kind = Solver.registry[result.manifest["settings"]["solver"]]
    assert not kind.requires.gradient
    # To rounding, the measurement is the signal: six values of prior deviation 0.2, each known to 1 / 8.
    assert (result.mean - y).abs().max() < 0.15
    with pytest.raises(CompatibilityError, match=r"black box: its gradient is zero everywhere"):
        ig.solve(y, function, PRIOR, sigma_y=0.05, solver="DPS", **QUIET)


def test_guide_does_not_ignore_a_rule_that_rounds():
    def rule(x: Tensor) -> Tensor:
        return -50 * (x.round().sum(1) - 6).abs()

    prior = ig.priors.Gaussian(torch.full((4,), 1.0), torch.eye(4))
    result = ig.guide(prior, rule, num_samples=64, **QUIET)
    # of samples of the prior, about one in six obeys
    assert (rule(result.samples[0]) == 0).double().mean() > 0.5
    with pytest.raises(CompatibilityError, match="zero everywhere"):
        ig.guide(prior, rule, solver="DPS", **QUIET)
    with pytest.raises(InputError, match="declared differentiable, but its gradient is zero"):
        ig.guide(prior, as_reward(rule, differentiable=True), **QUIET)


class Rule(Reward):
    def __call__(self, x: Tensor) -> Tensor:
        return -50 * (x.round().sum(1) - 6).abs()


def test_a_term_that_rounds_makes_the_sum_a_black_box():
    prior = ig.priors.Gaussian(torch.full((4,), 1.0), torch.eye(4))
    reward = Rule() + as_reward(lambda x: -x.square().sum(1))
    result = ig.guide(prior, reward, num_samples=64, **QUIET)
    assert not Solver.registry[result.manifest["settings"]["solver"]].requires.gradient
    with pytest.raises(CompatibilityError, match="zero everywhere"):
        ig.guide(prior, reward, solver="DPS", **QUIET)


# ---- a linear operator whose gradient is of no use has its adjoint


class Cut(LinearOperator):
    def forward(self, x: Tensor) -> Tensor:
        return (x @ MATRIX.T.to(x)).detach()

    def adjoint(self, y: Tensor) -> Tensor:
        return y @ MATRIX.to(y)

    def input_shape(self, y_shape: tuple[int, ...]) -> tuple[int, ...]:
        return (6,)


MATRIX = torch.randn(4, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def numpy_operator() -> Operator:
    matrix = MATRIX.numpy()
    return as_operator(
        lambda x: np.asarray(x) @ matrix.T, adjoint=lambda y: np.asarray(y) @ matrix, shape=(6,)
    )


@pytest.mark.parametrize("make", [Cut, numpy_operator])
def test_the_adjoint_is_the_gradient_of_linear_operators(make: Callable[[], Operator]):
    likelihood = Likelihood(make(), signals(2, 4), 0.1)
    x = signals(2, 6).requires_grad_()
    likelihood.try_gradient(x.detach())
    assert likelihood.differentiable
    (gradient,) = torch.autograd.grad(likelihood.log_prob(x).sum(), x)
    expected = (signals(2, 4) - x.detach() @ MATRIX.T) @ MATRIX / 0.01
    assert torch.allclose(gradient, expected, rtol=1e-6)
    decoded = likelihood.rows(torch.tensor([1, 1])).through(lambda z: 2 * z)
    (gradient,) = torch.autograd.grad(decoded.log_prob(x).sum(), x)
    expected = 2 * (signals(2, 4)[1] - 2 * x.detach() @ MATRIX.T) @ MATRIX / 0.01
    assert torch.allclose(gradient, expected, rtol=1e-6)


def test_a_gradient_solver_runs_on_a_linear_numpy_operator():
    y = signals(1, 6) @ MATRIX.T
    run = {"sigma_y": 0.05, "solver": "DPS", "dtype": torch.float64, **QUIET}
    a, b = (
        ig.solve(y, operator, PRIOR, **run).samples
        for operator in (numpy_operator(), lambda x: x @ MATRIX.T)
    )
    assert torch.allclose(a, b, atol=1e-6)


# ---- functions that write into their argument


def blank_out(x: Tensor) -> Tensor:
    x[:, 2:4] = 0
    return x


@pytest.mark.parametrize("function", [blank_out, lambda x: x.mul_(2), lambda x: x.clamp_(0, 1)])
@pytest.mark.parametrize("solver", ["DPS", "auto"])
def test_functions_get_a_copy(function: Callable[[Tensor], Tensor], solver: str):
    y = function(signals(1, 6))
    run = {"sigma_y": 0.05, "solver": solver, **QUIET}
    assert as_operator(function, shape=(6,)).differentiable
    pure = ig.solve(y, lambda x: function(x.clone()), PRIOR, **run)
    result = ig.solve(y, function, PRIOR, **run)
    assert torch.equal(result.samples, pure.samples)
    x = signals(2, 6)
    as_operator(function)(x)
    assert torch.equal(x, signals(2, 6))


def test_an_operator_that_changes_its_input_is_named():
    class Blank(Operator):
        def forward(self, x: Tensor) -> Tensor:
            return blank_out(x)

    with pytest.raises(InputError, match=r"Blank changes its input in place.*x\.clone\(\)"):
        ig.solve(signals(1, 6), Blank(), PRIOR, sigma_y=0.05, **QUIET)


# ---- networks inside, in training mode


class Held:
    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def measure(self, x: Tensor) -> Tensor:
        return self.net(x)

    def __call__(self, x: Tensor) -> Tensor:
        return self.net(x)


class WithNet(Operator):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


HOLDERS: dict[str, Callable[[nn.Module], Any]] = {
    "module": lambda net: net,
    "closure": lambda net: lambda x: net(x),
    "method": lambda net: Held(net).measure,
    "object": Held,
    "operator": WithNet,
}


@pytest.mark.parametrize("name", HOLDERS)
def test_networks_are_used_in_evaluation_mode_and_left_as_found(name: str):
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))
    net[0].running_mean.fill_(0.3)
    net[2].eval()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    x = signals(4, 6).float()
    expected = net.eval()(x).detach()
    for _ in range(2):
        net.train()
        net[2].eval()
        operator = as_operator(HOLDERS[name](net))
        assert torch.equal(operator(x), expected)
        held = HOLDERS[name](net)
        reward: Any = as_reward(lambda x, held=held: held(x).sum(1))
        assert torch.equal(reward(x), expected.sum(1))
        assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
        assert [m.training for m in net] == [True, True, False]
        assert net.training


# ---- inner solves are counted, and said where they do not end


class Diagonal(LinearOperator):
    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values, self.calls = values, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.values.to(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return y * self.values.to(y)

    def input_shape(self, y_shape: tuple[int, ...]) -> tuple[int, ...]:
        return y_shape


@pytest.mark.parametrize(("low", "sigma_y", "ends"), [(0.5, 0.1, True), (1e-4, 1e-6, False)])
def test_inner_iterations_are_in_the_manifest(low: float, sigma_y: float, ends: bool):
    n = 2000
    prior = FlatPrior(n)
    operator = Diagonal(torch.logspace(0, np.log10(low), n, dtype=torch.float64))
    y = signals(1, n) * operator.values
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = ig.solve(
            y,
            operator,
            prior,
            sigma_y=sigma_y,
            solver=HQS(num_steps=4),
            dtype=torch.float64,
            **QUIET,
        )
    inner = result.manifest["inner_solves"]
    # One call of the operator in each iteration, and a handful besides: trials, residuals, the last look.
    assert 0 <= operator.calls - inner["iterations"] <= 30
    assert inner["solves"] == 5
    assert (inner["unfinished"] == 0) == ends
    assert (inner["most"] == 500) != ends
    assert any("inner solves of HQS stopped after 500" in str(w.message) for w in caught) != ends


class FlatPrior(Prior):
    """Independent normals of mean 0.5 and deviation 0.3."""

    sigma_min, sigma_max, sigma_data = 0.01, 10.0, 0.58

    def __init__(self, n: int) -> None:
        super().__init__()
        self.shape = (n,)

    def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
        level = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1) ** 2
        return 0.5 + (x - 0.5) * 0.09 / (0.09 + level)
