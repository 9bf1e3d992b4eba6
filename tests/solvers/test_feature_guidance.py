"""FeatureGuidance: an exact posterior, autograd and hooks; features survive checkpointing, and planted faults show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import invguide as ig
from invguide import driver
from invguide.api import load_prior
from invguide.errors import CompatibilityError, InputError, ShapeError
from invguide.feature_reward import FeatureReward
from invguide.numerics.hooks import record
from invguide.prior import Prior
from invguide.priors import from_network
from invguide.problem.problem import Problem
from invguide.reward import as_reward
from invguide.rewards import TotalVariation
from invguide.rng import Noise
from invguide.solvers import DPS, FeatureGuidance, Unconditional, feature_guidance
from invguide.solvers.feature_guidance import feature_gradient
from special_rewards import MEAN, MODULES, SIGMA_Y, VARIANCE, Y, distance, gaussian, network


def moments(prior: Prior, reward: ig.Reward, solver: FeatureGuidance) -> list[list[float]]:
    run = ig.guide(
        prior, reward, solver=solver, num_samples=1500, dtype=torch.float64, progress=False
    )
    samples = run.samples[0]
    return [samples.mean(0).tolist(), samples.std(0).tolist()]


EXACT_MEAN = MEAN + (Y - MEAN) * VARIANCE / (VARIANCE + SIGMA_Y**2)
EXACT_STD = (VARIANCE * SIGMA_Y**2 / (VARIANCE + SIGMA_Y**2)) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("weight", ["likelihood", "bounded"])
def test_a_perfect_head_gives_the_posterior(weight: str):
    """One standard error of 1500 samples is 0.026 of a mean of unit spread and 1.8 % of a spread; steps add 2 %."""
    mean, std = moments(*gaussian(), FeatureGuidance(100, weight=weight))
    assert mean == pytest.approx([EXACT_MEAN, MEAN], abs=0.07)
    assert std == pytest.approx([EXACT_STD, VARIANCE**0.5], rel=0.07)


@pytest.mark.slow
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_planted_wrong_strength_is_caught(factor: float, monkeypatch: pytest.MonkeyPatch):
    def wrong(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        denoised, value, gradient = feature_gradient(*arguments)
        return denoised, value, factor * gradient

    monkeypatch.setattr(feature_guidance, "feature_gradient", wrong)
    solver = FeatureGuidance(50, weight="likelihood", schedule="exponential")
    mean, std = moments(*gaussian(), solver)
    assert abs(mean[0] - EXACT_MEAN) > 0.07 or abs(std[0] / EXACT_STD - 1) > 0.2


# ---- the gradient


def no_reentrant(function: Callable[..., Tensor], x: Tensor) -> Tensor:
    return checkpoint(function, x, use_reentrant=False)


def reentrant(function: Callable[..., Tensor], x: Tensor) -> Tensor:
    return checkpoint(function, x, use_reentrant=True)


def states(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 8, 8, dtype=torch.float64)


@pytest.mark.parametrize("repeat", [None, no_reentrant])
def test_the_gradient_is_autograds_with_and_without_checkpointing(repeat: Any):
    """By hand: the same layers written out."""
    prior, x = network(repeat), states().requires_grad_()
    block = prior.net
    first = block.first(x)
    middle = nn.functional.silu(first)
    second = block.second(middle)
    expected = distance({"a": first, "b": middle, "c": second}) - 0.5 * (
        torch.tanh(second).square().flatten(1).sum(1)
    )
    (wanted,) = torch.autograd.grad(expected.sum(), x)
    others = as_reward(lambda d: d.square().flatten(1).sum(1))
    prior.scale, prior.shift = 1.0, 0.0
    reward = FeatureReward(prior, MODULES, distance) - 0.5 * others
    problem = Problem(prior, reward=reward)
    denoised, value, gradient = feature_gradient(problem, x, 0.5)
    torch.testing.assert_close(denoised, torch.tanh(second))
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, wanted)
    assert block.calls == (1 if repeat is None else 2)
    assert (problem.counters.network, problem.counters.vjp) == (3, 3)


def test_the_gradient_is_a_central_difference():
    prior, x, step = network(), states(1), 1e-5
    problem = Problem(prior, reward=FeatureReward(prior, MODULES, distance))
    gradient = feature_gradient(problem, x, 0.5)[2]
    direction = states(1)
    ends = [feature_gradient(problem, x + s * step * direction, 0.5)[1] for s in (1, -1)]
    slope = (ends[0] - ends[1]) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum()[None], slope, rtol=1e-7, atol=0)


def test_features_of_a_checkpointed_network_are_neither_repeated_nor_dropped():
    """Inside the recording too, where a backward pass could record the repeated forward pass."""
    prior, x = network(no_reentrant), states().requires_grad_()
    with record(prior, MODULES) as found:
        prior.denoise(x, 0.5)
    counts = {name: len(values) for name, values in found.items()}
    assert counts == dict.fromkeys(MODULES, 1)
    torch.autograd.grad(sum(f[0].sum() for f in found.values()), x)
    assert {name: len(values) for name, values in found.items()} == counts


def test_planted_hooks_that_stay_record_the_repeated_pass(monkeypatch: pytest.MonkeyPatch):
    """Hooks that outlive the call would see every recomputed module again."""
    monkeypatch.setattr(torch.utils.hooks.RemovableHandle, "remove", lambda self: None)
    prior, x = network(no_reentrant), states().requires_grad_()
    with record(prior, MODULES) as found:
        prior.denoise(x, 0.5)
    torch.autograd.grad(sum(f[0].sum() for f in found.values()), x)
    assert len(found["net.first"]) == 2


def test_work_in_place_does_not_change_what_is_recorded():
    net: Any = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True))
    net.forward = lambda x, time: nn.Sequential.forward(net, x)
    prior = from_network(net, "x0", "ve", shape=(3, 8, 8))
    x = states().float()
    with record(prior, ["net.0"]) as found:
        prior.denoise(x, 0.5)
    torch.testing.assert_close(found["net.0"][0], net[0](x))
    assert (found["net.0"][0] < 0).any()


# ---- hooks


def hooks(prior: Prior) -> int:
    return sum(len(m._forward_hooks) for m in prior.modules())


class Stop(Exception):
    pass


def test_hooks_live_for_one_call_only_also_where_it_fails():
    prior = network()
    reward = FeatureReward(prior, MODULES, distance)
    problem = Problem(prior, reward=reward)
    assert hooks(prior) == 0
    seen = []
    handle = prior.net.second.register_forward_hook(lambda *_: seen.append(hooks(prior)))
    feature_gradient(problem, states(), 0.5)
    reward(states())
    assert seen == [4, 4]  # ours and this one
    handle.remove()
    assert hooks(prior) == 0
    prior.net.second.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(Stop))
    for call in (lambda: feature_gradient(problem, states(), 0.5), lambda: reward(states())):
        with pytest.raises(Stop):
            call()
        assert hooks(prior) == 0


def test_the_prior_is_as_before():
    prior, x = network(), states()
    before = prior.denoise(x, 0.5)
    ig.guide(
        prior, FeatureReward(prior, MODULES, distance), solver=FeatureGuidance(3), progress=False
    )
    assert torch.equal(prior.denoise(x, 0.5), before)


# ---- rewards


class Branches(Prior):
    """A prior that calls its network twice, as guided priors do."""

    shape, sigma_min, sigma_max = (3, 8, 8), 0.01, 10.0

    def __init__(self, prior: Prior) -> None:
        super().__init__()
        self.inner = prior

    def denoise(self, x: Tensor, sigma: Any, **condition: Tensor) -> Tensor:
        return 2 * self.inner.denoise(x, sigma) - self.inner.denoise(0.9 * x, sigma)


def test_a_network_that_is_called_twice_is_scored_twice():
    prior, x = network(), states()
    reward, guided = FeatureReward(prior, MODULES, distance), Branches(prior)
    both = [feature_gradient(Problem(prior, reward=reward), s * x, 0.5)[1] for s in (1, 0.9)]
    value = feature_gradient(Problem(guided, reward=reward), x, 0.5)[1]
    torch.testing.assert_close(value, (both[0] + both[1]) / 2)


class Conditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 3)

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        return torch.tanh(x * self.table(label)[:, :, None, None])


def test_conditional_priors():
    net = Conditional()
    prior = from_network(net, "x0", "ve", shape=(3, 8, 8))
    label = torch.tensor([2])
    reward = FeatureReward(
        prior, "net.table", lambda f: f["net.table"].sum(1), condition={"label": label}
    )
    wanted = net.table.weight[2].sum().expand(3)
    torch.testing.assert_close(reward(states().float()), wanted)
    problem = Problem(prior, reward=reward + TotalVariation(), condition={"label": label})
    result = driver.run(FeatureGuidance(3), problem, 1, progress=False)
    assert torch.isfinite(result.samples).all()


def test_as_a_reward_of_clean_signals():
    """The features at the lowest level, differentiable, with independent rows; other solvers can follow it."""
    prior = network()
    prior.scale, prior.shift = 0.5, 0.5
    reward = FeatureReward(prior, MODULES, distance)
    x = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    value = feature_gradient(Problem(prior, reward=reward), 2 * x - 1, prior.sigma_min)[1]
    torch.testing.assert_close(reward(x), value)
    certificate = reward.check(x=x, quiet=True)
    assert certificate.ok, str(certificate)
    assert certificate["differentiable"].verdict == "ok"
    solver = DPS(10)
    followed = ig.guide(prior, reward, solver=solver, num_samples=4, progress=False)
    free = ig.guide(prior, 0 * reward, solver=solver, num_samples=4, progress=False)
    assert followed.log_prob.mean() > reward(free.samples[0]).mean()
    assert repr(reward) == f"FeatureReward(NetworkPrior, {MODULES}, distance)"


# ---- the solver


def stripes(features: dict[str, Tensor]) -> Tensor:
    """More of one channel of the embedded prior's middle, less of another."""
    middle = features["net.encoder.2"].mean((2, 3))
    return 30 * (middle[:, 3] - middle[:, 5])


@pytest.fixture(scope="module")
def tiny() -> Prior:
    return load_prior("natural-tiny")


@pytest.mark.slow
@pytest.mark.parametrize("weight", ["bounded", "official"])
def test_the_embedded_prior(tiny: Prior, weight: str):
    reward = FeatureReward(tiny, "net.encoder.2", stripes)
    solver = FeatureGuidance(12, weight=weight, learning_rate=0.1, num_inner_steps=2)
    settings: dict[str, Any] = {"shape": (3, 32, 32), "num_samples": 3, "progress": False}
    result = ig.guide(tiny, reward, solver=solver, **settings)
    free = ig.guide(tiny, reward, solver=Unconditional(12), **settings)
    assert (result.log_prob > free.log_prob).all()
    own = 12 if weight == "bounded" else 36
    assert result.nfe in (
        own,
        own + 8 / 3,
    )  # 8 calls in all measure what is clean, where a result looks odd


def test_no_reward_no_change(tiny: Prior):
    settings: dict[str, Any] = {"shape": (3, 32, 32), "num_samples": 2, "progress": False}
    reward = FeatureReward(tiny, "net.encoder.2", stripes)
    free = ig.guide(tiny, reward, solver=Unconditional(5), **settings).samples
    for change in ({"guidance_scale": 0.0}, {"window": (0.99, 1.0)}):
        ours = ig.guide(tiny, reward, solver=FeatureGuidance(5, **change), **settings).samples
        assert torch.equal(ours, free)


def test_the_official_step_is_torch_adam():
    """With one inner step: z moves by the learning rate along the sign of the gradient."""
    prior, a = network(), 2.0
    problem = Problem(prior, reward=FeatureReward(prior, MODULES, distance))
    noise = Noise(0, ((0, 0),), (3, 8, 8), torch.float64).at(0)
    solver = FeatureGuidance(2, weight="official", learning_rate=0.01, schedule=(a, 1.0, 0.0))
    x = states(1)
    state = solver.init(problem, noise.at(-1))._replace(x=x)
    moved = x + 0.01 * (1 + a**2) ** 0.5 * feature_gradient(problem, x, a)[2].sign()
    after, _ = solver.step(problem, state, 0, noise)
    denoised = prior.denoise(moved, a)
    torch.testing.assert_close(after.denoised, denoised, rtol=1e-5, atol=1e-6)


# ---- mistakes


def guide(function: Callable[[dict[str, Tensor]], Any], modules: Any = "net.first") -> None:
    prior = network()
    reward = FeatureReward(prior, modules, function)
    feature_gradient(Problem(prior, reward=reward), states(), 0.5)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def of_a_pair() -> None:
    net: Any = nn.Sequential(Pair())
    net.forward = lambda x, time: net[0](x)[0]
    prior = from_network(net, "x0", "ve", shape=(3, 8, 8))
    FeatureReward(prior, "net.0", lambda f: f)(states())


def of_another_prior() -> None:
    reward = FeatureReward(network(), "net.first", distance)
    feature_gradient(Problem(network(), reward=reward), states(), 0.5)


def uneven() -> None:
    prior = network()
    inner = prior.net.inside
    prior.net.inside = lambda x: inner(x) + 0 * prior.net.first(x).mean()
    feature_gradient(Problem(prior, reward=FeatureReward(prior, MODULES, distance)), states(), 0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: guide(distance, "net.frist"), "no module 'net.frist'; did you mean 'net.first'"),
        (lambda: guide(distance, ()), "no module of NetworkPrior is named; choose one of"),
        (
            lambda: FeatureReward(from_network(lambda x, t: x), "net.a", distance),
            "has no modules at all",
        ),
        (lambda: FeatureReward(network(), "net", 3), "function is 3; expected a callable"),  # pyright: ignore[reportArgumentType]
        (lambda: guide(lambda f: f["net.first"].detach().sum((1, 2, 3))), "its gradient is None"),
        (lambda: guide(lambda f: f["net.first"].sum()), r"returned shape \(\) for 3 samples"),
        (lambda: guide(lambda f: 1j * f["net.first"].sum((1, 2, 3))), "returned complex"),
        (of_a_pair, "module 'net.0' returns a tuple"),
        (of_another_prior, "modules net.first were not called"),
        (uneven, "a different number of times in one pass"),
    ],
)
def test_mistakes_are_named(call: Callable[[], Any], message: str):
    with pytest.raises(InputError, match=message):
        call()


def test_a_reentrant_checkpoint_is_refused_rather_than_dropped():
    prior = network(reentrant)
    problem = Problem(prior, reward=FeatureReward(prior, "net.first", distance))
    with pytest.raises(InputError, match=r"'net.first' runs without gradients.*use_reentrant=Fal"):
        feature_gradient(problem, states().requires_grad_(), 0.5)


def test_rewards_without_features_are_refused(tiny: Prior):
    with pytest.raises(
        CompatibilityError,
        match=r"needs a reward of the kind FeatureReward, and TotalVar.*do: .*DPS",
    ):
        ig.guide(tiny, TotalVariation(), solver=FeatureGuidance(3), shape=(3, 32, 32))
    with pytest.raises(ShapeError, match="one value each"):
        ig.guide(tiny, FeatureReward(tiny, "net.stem", lambda f: f["net.stem"]), shape=(3, 32, 32))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": "oficial"}, "weight is 'oficial'; did you mean 'offic"),
        ({"guidance_scale": -1.0}, "guidance_scale is -1"),
        ({"learning_rate": 0.0}, "learning_rate is 0"),
        ({"num_inner_steps": 0}, "num_inner_steps is 0"),
        ({"window": (0.5, 0.5)}, "window is"),
    ],
)
def test_constructor_validates(settings: dict, message: str):
    with pytest.raises(InputError, match=message):
        FeatureGuidance(**settings)
