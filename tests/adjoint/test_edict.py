"""EDICT: against its published form, round trips, gradients against autograd, memory, and what is refused.

Tolerances: the same arithmetic in another order agrees to 1e-12 in float64. The way back enlarges rounding errors by
p^(-2n), 1.4e3 for 50 steps at p = 0.93, and once more in the gradient: 1e-10 leaves three digits.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import invguide as ig
from invguide.adjoint import edict
from invguide.adjoint import symplectic as adjoint
from invguide.adjoint.edict import Pair, invert, rollout, rollout_gradient, rollout_in
from invguide.errors import InputError, ShapeError
from invguide.prior import Prior
from invguide.priors import Gaussian, GaussianMixture
from invguide.problem.problem import Problem
from invguide.reward import as_reward
from invguide.schedule import make_sigmas
from invguide.system.memory import peak_memory


@pytest.fixture
def mixture() -> GaussianMixture:
    means = torch.tensor([[-1.0, 0, 2], [1.0, 0, -1], [0.5, 2, 0]], dtype=torch.float64)
    return GaussianMixture(means, 0.1 * torch.eye(3).double(), [0.5, 0.3, 0.2])


@pytest.fixture
def network() -> Prior:
    return ig.load_prior("natural-tiny")


def levels(prior: Prior, n: int) -> Tensor:
    return make_sigmas("karras", n, prior.sigma_min, prior.sigma_max)


def loss(x: Tensor) -> Tensor:
    return x.sin().flatten(1).sum(1) + x.flatten(1)[:, 0] ** 2


def distance(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


# ---- the published form


def published(prior: Prior, x: Tensor, sigmas: Sequence[float], p: float) -> Pair:
    """The paper's steps with the variance-preserving network eps(x, t) and alpha-bar; for autograd to follow."""

    def eps(x: Tensor, sigma: float) -> Tensor:
        return prior.eps(x * math.sqrt(1 + sigma**2), x.new_tensor(sigma))

    pair = [x / math.sqrt(1 + sigmas[0] ** 2)] * 2
    for k, (s, t) in enumerate(pairwise(sigmas)):
        before, after = 1 / (1 + s**2), 1 / (1 + t**2)  # alpha-bar
        a = math.sqrt(after / before)
        b = math.sqrt(1 - after) - math.sqrt(after * (1 - before) / before)
        i, j = (0, 1) if k % 2 == 0 else (1, 0)
        pair[i] = a * pair[i] + b * eps(pair[j], s)
        pair[j] = a * pair[j] + b * eps(pair[i], s)
        pair[i] = p * pair[i] + (1 - p) * pair[j]
        pair[j] = p * pair[j] + (1 - p) * pair[i]
    scale = math.sqrt(1 + sigmas[-1] ** 2)
    return Pair(scale * pair[0], scale * pair[1])


def unit(prior: Prior) -> Prior:
    """The published form is that of data of size 1."""
    prior.sigma_data = 1.0
    return prior


@pytest.mark.parametrize("mixing", [0.8, 0.93, 1.0])
def test_is_the_published_chain(mixing: float, mixture: Prior):
    unit(mixture)
    x = 10 * torch.randn(4, 3, dtype=torch.float64)
    for end in (0.0, 0.5):
        sigmas = [10.0, 5.0, 2.0, 1.0, end]
        expected = published(mixture, x, sigmas, mixing)
        found = rollout(mixture, x, sigmas, mixing)
        assert distance(found.x, expected.x) < 1e-12
        assert distance(found.y, expected.y) < 1e-12


def test_converges_to_the_flow(mixture: Prior):
    """Of first order, as DDIM; and so does the difference of the pair."""
    x = mixture.sigma_max * torch.randn(50, 3, dtype=torch.float64)
    fine = adjoint.rollout(mixture, x, levels(mixture, 400), "heun")
    ends = [rollout(mixture, x, levels(mixture, n)) for n in (40, 80)]
    errors = [distance(end.mean, fine) for end in ends]
    gaps = [distance(end.x, end.y) for end in ends]
    assert errors[1] < 0.6 * errors[0] < 0.06
    assert gaps[1] < 0.5 * gaps[0] < 1e-2


# ---- round trips


def way_back(prior: Prior, x: Tensor, mixing: float, n: int = 50) -> float:
    sigmas = levels(prior, n)
    with torch.no_grad():
        start = invert(prior, rollout(prior, x, sigmas, mixing), sigmas, mixing)
    return max(distance(start.x, x), distance(start.y, x))


def starts(prior: Prior, *shape: int) -> Tensor:
    return prior.sigma_max * torch.randn(2, *shape, dtype=torch.float64)


def test_round_trip_of_fifty_steps_through_the_network(network: Prior):
    """1e-9 in float64; in float32, 1e-7 times the 1.4e3 of p^(-2n) bounds it."""
    x = starts(network, 3, 8, 8)[:1]
    error = way_back(network, x.float(), 0.93)
    print(f"float32, network, p = 0.93: {error:.1e}")
    assert error < 1.4e-4
    assert way_back(network.double(), x, 0.93) < 1e-9


def test_mixing_that_each_precision_allows(mixture: Prior):
    """The smallest p whose way back of 50 steps stays within a tolerance follows p^(-2n) times the rounding error."""
    x = starts(mixture, 3)
    weights = (0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.97, 1.0)
    allowed = {}
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        prior, start = mixture.to(dtype), x.to(dtype)
        errors = [way_back(prior, start, p) for p in weights]
        print(dtype, *(f"{p}: {e:.0e}" for p, e in zip(weights, errors, strict=True)))
        bound = [10 * torch.finfo(dtype).eps * p**-100 for p in weights]
        assert all(e < b for e, b in zip(errors, bound, strict=True))
        allowed[dtype] = min(p for p, e in zip(weights, errors, strict=True) if e < tolerance)
    print(allowed)
    assert allowed[torch.float64] <= 0.85
    assert 0.85 <= allowed[torch.float32] <= 0.93


@pytest.mark.parametrize("n", [10, 20, 50, 100])
def test_default_mixing(n: int, mixture: Prior):
    """0.93 for 50 steps; for any number of them the way back is exact, and the two ends agree to a percent."""
    assert edict.choose_mixing(None, 50) == 0.93
    assert edict.choose_mixing(None, n) ** n == pytest.approx(0.93**50)
    x = starts(mixture, 3)
    end = rollout(mixture, x, levels(mixture, n))
    assert distance(end.x, end.y) < 1e-2
    assert distance(invert(mixture, end, levels(mixture, n)).x, x) < 1e-10


def test_a_clean_signal_is_encoded_and_found_again(mixture: GaussianMixture):
    x0 = mixture.sample(5)
    sigmas = levels(mixture, 50)
    start = invert(mixture, Pair(x0, x0), sigmas)
    again = rollout(mixture, start, sigmas)
    assert distance(again.x, x0) < 1e-10
    assert distance(again.y, x0) < 1e-10
    assert distance(start.x, start.y) > 1e-6  # a pair of its own, not a tied one


# ---- gradients


@pytest.mark.parametrize(("n", "mixing"), [(1, 0.93), (2, 0.8), (7, 0.93), (50, 0.93), (20, 1.0)])
def test_gradient_equals_autograd(n: int, mixing: float, mixture: Prior):
    unit(mixture)
    x, sigmas = starts(mixture, 3), levels(mixture, n)
    start = x.clone().requires_grad_()
    expected = loss(published(mixture, start, sigmas.tolist(), mixing).mean)
    (right,) = torch.autograd.grad(expected.sum(), start)
    value, gradient = rollout_gradient(mixture, x, sigmas, loss, mixing)
    assert distance(value, expected) < 1e-10
    assert distance(gradient, right) < 1e-10
    single = rollout_gradient(mixture.float(), x.float(), sigmas, loss, mixing)[1]
    print(f"float32, n = {n}, p = {mixing}: {distance(single, right):.1e}")
    assert distance(single, right) < 1e-2


def test_gradient_through_the_network(network: Prior):
    x, sigmas = starts(network, 3, 8, 8)[:1], levels(network, 4)
    unit(network)
    single = rollout_gradient(network, x.float(), sigmas, loss, 0.93)[1]
    start = x.clone().requires_grad_()
    end = published(network.double(), start, sigmas.tolist(), 0.93).mean
    (right,) = torch.autograd.grad(loss(end).sum(), start)
    assert distance(rollout_gradient(network, x, sigmas, loss, 0.93)[1], right) < 1e-10
    assert distance(single, right) < 1e-4


def test_both_ends_of_a_pair_have_gradients(mixture: Prior):
    """Of functions of x and y apart, with respect to a start that is no tied pair."""
    pair = [3 * torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def apart(x: Tensor, y: Tensor) -> Tensor:
        end = rollout(mixture, Pair(x, y), [5.0, 2.0, 1.0, 0.0])
        return (end.x**2).sum(1) + end.y.cos().sum(1)

    assert torch.autograd.gradcheck(apart, pair)


def test_memory_does_not_depend_on_the_steps(network: Prior):
    """To the byte, the states included; full back-propagation grows with every step."""
    x = torch.randn(1, 3, 8, 8)

    def full(n: int) -> None:
        start = x.clone().requires_grad_()
        loss(published(network, start, levels(network, n).tolist(), 0.93).mean).sum().backward()

    def ours(n: int) -> None:
        rollout_gradient(network, x, levels(network, n), loss)

    ours(2)  # whatever the network remembers from its first call
    cpu = torch.device("cpu")
    few, many = (peak_memory(partial(ours, n), cpu) for n in (2, 7))
    grown = [peak_memory(partial(full, n), cpu) for n in (1, 2)]
    print(f"2 and 7 steps: {few} and {many} bytes; back-propagation of 1 and 2: {grown}")
    assert many <= 1.001 * few
    assert grown[1] > 1.8 * grown[0] > 1.5 * few


def test_calls_are_counted(mixture: Prior):
    problem = Problem(mixture, reward=as_reward(loss))
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    end = rollout_in(problem, x, levels(mixture, 5).tolist())
    assert torch.equal(end, rollout(mixture, x, levels(mixture, 5)).mean)
    assert (problem.counters.network, problem.counters.vjp) == (4 * 10, 0)
    torch.autograd.grad(end.sum(), x)
    assert (problem.counters.network, problem.counters.vjp) == (4 * 20, 4 * 10)


def test_rows_are_independent(mixture: Prior):
    x, sigmas = starts(mixture, 3), levels(mixture, 6)
    together = rollout_gradient(mixture, x, sigmas, loss)[1]
    alone = [rollout_gradient(mixture, row[None], sigmas, loss)[1] for row in x]
    assert distance(torch.cat(alone), together) < 1e-12


class Labelled(Prior):
    shape = (3,)
    sigma_min, sigma_max = 0.01, 10.0

    def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
        return torch.tanh(x + condition["shift"])


def test_conditions_reach_the_prior():
    x, shift = torch.randn(2, 2, 3, dtype=torch.float64)
    sigmas = [3.0, 1.0, 0.0]
    end = rollout(Labelled(), x, sigmas, condition={"shift": shift})
    start = invert(Labelled(), end, sigmas, condition={"shift": shift})
    assert distance(start.x, x) < 1e-12
    plain = rollout(Labelled(), x, sigmas, condition={"shift": 0 * shift})
    assert distance(plain.x, end.x) > 1e-2


# ---- planted bugs


def mutant(tmp_path: Path, old: str, new: str) -> ModuleType:
    """The module `edict` with one piece of its source replaced."""
    source = Path(edict.__file__).read_text("utf-8")
    assert source.count(old) == 1, old
    path = tmp_path / "mutant.py"
    path.write_text(source.replace(old, new), "utf-8")
    spec = importlib.util.spec_from_file_location("mutant", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wrong_by(module: ModuleType, prior: Prior) -> float:
    """Error of value, gradient and round trip against the published chain, 0 where all agree."""
    unit(prior)
    x, sigmas = starts(prior, 3), levels(prior, 8)
    start = x.clone().requires_grad_()
    expected = loss(published(prior, start, sigmas.tolist(), 0.93).mean)
    (right,) = torch.autograd.grad(expected.sum(), start)
    value, gradient = module.rollout_gradient(prior, x, sigmas, loss, 0.93)
    back = module.invert(prior, module.rollout(prior, x, sigmas, 0.93), sigmas, 0.93)
    return max(distance(value, expected), distance(gradient, right), distance(back.x, x))


MUTANTS = {
    "no change of scale": ("math.hypot(size, a) / math.hypot(size, b)", "1.0"),
    "no alternation": ("return Pair(y, x)\n\n\ndef _unmix", "return Pair(x, y)\n\n\ndef _unmix"),
    "mixed at once": (
        "x = mixing * x + (1 - mixing) * y\n    y = mixing * y + (1 - mixing) * x\n    return",
        "x, y = mixing * x + (1 - mixing) * y, mixing * y + (1 - mixing) * x\n    return",
    ),
    "chain rule of the scale": ("x_bar + step.stretch * pulled", "x_bar + pulled"),
    "mixing of the gradient": ("x_bar = x_bar + (1 - mixing) * y_bar", "pass"),
    "inverse in the same order": (
        "y = y - _push(denoise, step.stretch * x, step)\n    x = x - _push(denoise, y, step)",
        "x = x - _push(denoise, y, step)\n    y = y - _push(denoise, step.stretch * x, step)",
    ),
}


def test_without_planted_bugs_all_agrees(mixture: Prior):
    assert wrong_by(edict, mixture) < 1e-10


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bugs_are_caught(name: str, tmp_path: Path, mixture: Prior):
    module = mutant(tmp_path, *MUTANTS[name])
    setattr(module, "LOST", math.inf)  # noqa: B010  the mistake itself, not the check that would stop it
    assert wrong_by(module, mixture) > 1e-3


# ---- what is refused


@pytest.mark.parametrize("mixing", [0.5, 0.0, 1.01, -1.0, math.nan])
def test_mixing_out_of_range(mixing: float, mixture: Prior):
    with pytest.raises(InputError, match=f"mixing is {mixing}; expected a weight above 0.5"):
        rollout(mixture, torch.zeros(1, 3), [1.0, 0.0], mixing)


@pytest.mark.parametrize(
    ("sigmas", "error", "message"),
    [
        ([1.0], InputError, "1 levels; a roll-out of n >= 1 steps takes n \\+ 1"),
        ([1.0, 2.0], InputError, "decrease strictly"),
        ([math.inf, 1.0], InputError, "finite"),
        ([[1.0, 0.0]], ShapeError, r"sigmas has shape \(1, 2\)"),
    ],
)
def test_levels_that_are_no_rollout(sigmas, error, message: str, mixture: Prior):
    for run in (rollout, lambda p, x, s: invert(p, Pair(x, x), s)):
        with pytest.raises(error, match=message):
            run(mixture, torch.zeros(1, 3), sigmas)


def test_a_way_back_that_is_lost_is_named(mixture: Prior):
    """In float32, 50 steps with p = 0.6 enlarge rounding errors by 1e22."""
    x = starts(mixture, 3).float()
    with pytest.raises(InputError, match=r"50 steps with mixing=0.6 missed its start.*float64"):
        rollout_gradient(mixture.float(), x, levels(mixture, 50), loss, 0.6)


def test_dropout_is_named():
    class Dropping(Gaussian):
        def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
            return nn.functional.dropout(super().denoise(x, sigma, **condition), 0.5)

    with pytest.raises(InputError, match="evaluation mode: it must be deterministic"):
        rollout_gradient(
            Dropping(torch.zeros(3), torch.eye(3)), torch.randn(2, 3), [3.0, 1.0, 0.0], loss
        )


def test_losses_are_checked(mixture: Prior):
    with pytest.raises(InputError, match="gradient of the loss is None"):
        rollout_gradient(mixture, torch.randn(2, 3), [1.0, 0.0], lambda x: torch.zeros(2))
