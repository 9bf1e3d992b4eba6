"""Gradients through roll-outs against full back-propagation of textbook formulas, their memory, and what is refused.

Tolerances: the same sums in another order, so float64 agrees to 1e-12 and float32 to 1e-5, relative to the gradient's
norm; both leave two digits or more for roll-outs of 64 steps.
"""

from __future__ import annotations

import importlib.util
import math
import weakref
from collections.abc import Callable
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import invguide as ig
from invguide.adjoint import symplectic as adjoint
from invguide.adjoint.symplectic import guide_through, rollout, rollout_gradient, rollout_in
from invguide.errors import InputError, ShapeError
from invguide.numerics import tableaus
from invguide.numerics.linear import per_sample
from invguide.numerics.tableaus import METHODS, TABLEAUS, make_steps
from invguide.prior import Prior
from invguide.priors import Gaussian, GaussianMixture, from_network
from invguide.problem.problem import Problem
from invguide.reward import as_reward

# Order of convergence, as in the textbooks.
ORDER = {
    "euler": 1,
    "ddim": 1,
    "midpoint": 2,
    "heun": 2,
    "ralston": 2,
    "rk4": 4,
    "dpm++2s": 2,
    "dpm++2m": 2,
}


def levels(n: int, start: float = 10.0, end: float = 0.0) -> list[float]:
    """n + 1 levels that fall by equal factors, the last one replaced by `end`."""
    return [
        *torch.logspace(math.log10(start), -1.5, n + 1, dtype=torch.float64)[:-1].tolist(),
        end,
    ]


def naive(
    prior: Prior, x: Tensor, sigmas: list[float], method: str, **condition: Tensor
) -> Tensor:
    """The solvers as their sources write them, in derivatives, stages k_i and log-SNR, for autograd to follow."""

    def denoise(x: Tensor, s: float) -> Tensor:
        return prior.denoise(x, x.new_tensor(s), **condition)

    def slope(x: Tensor, s: float) -> Tensor:
        return (x - denoise(x, s)) / s

    def snr(s: float) -> float:
        return -math.log(s)

    before = None
    for k, (a, b) in enumerate(pairwise(sigmas)):
        h = b - a
        if method in TABLEAUS and not (b == 0 and method in ("heun", "rk4")):
            nodes, matrix, weights = TABLEAUS[method]
            stages: list[Tensor] = []
            for c, row in zip(nodes, matrix, strict=True):
                point = x + h * sum((w * s for w, s in zip(row, stages)), torch.zeros_like(x))
                stages.append(slope(point, a + c * h))
            x = x + h * sum((w * s for w, s in zip(weights, stages)), torch.zeros_like(x))
            continue
        denoised = denoise(x, a)
        if method == "dpm++2s" and b > 0:
            s = math.exp(-(snr(a) + snr(b)) / 2)
            u = s / a * x - math.expm1(snr(a) - snr(s)) * denoised
            x = b / a * x - math.expm1(snr(a) - snr(b)) * denoise(u, s)
        elif method == "dpm++2m" and before is not None and b > 0:
            step = snr(b) - snr(a)
            r = (snr(a) - snr(sigmas[k - 1])) / step
            mixed = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * before
            x = b / a * x - math.expm1(-step) * mixed
        else:
            x = x + h * (x - denoised) / a
        before = denoised
    return x


def loss(x: Tensor) -> Tensor:
    return x.sin().flatten(1).sum(1) + x.flatten(1)[:, 0] ** 2


def mixture() -> GaussianMixture:
    means = torch.tensor([[-1.0, 0, 2], [1.0, 0, -1], [0.5, 2, 0]], dtype=torch.float64)
    return GaussianMixture(means, 0.1 * torch.eye(3).double(), [0.5, 0.3, 0.2])


@pytest.fixture(scope="module")
def network() -> Prior:
    return ig.load_prior("natural-tiny")


def error(
    prior: Prior, x: Tensor, sigmas: list[float], method: str, module: ModuleType = adjoint, **more
) -> float:
    """Of value and gradient, relative to full back-propagation."""
    start = x.clone().requires_grad_()
    expected = loss(naive(prior, start, sigmas, method))
    (gradient,) = torch.autograd.grad(expected.sum(), start)
    value, found = module.rollout_gradient(prior, x, sigmas, loss, method, **more)
    return max(distance(value, expected), distance(found, gradient))


def distance(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


# ---- exactness


@pytest.mark.parametrize(
    ("method", "n"),
    [*product(METHODS, (1, 2, 7)), *product(("euler", "midpoint", "dpm++2m"), (64,))],
)
def test_equals_full_back_propagation(method: str, n: int):
    prior = mixture()
    x = 10 * torch.randn(4, 3, dtype=torch.float64)
    for end in (0.0, 0.01):
        assert error(prior, x, levels(n, end=end), method) < 1e-12
    assert error(prior, x.float(), levels(n), method) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_equals_full_back_propagation_on_the_network(method: str, network: Prior):
    x = 5 * torch.randn(2, 3, 32, 32)
    assert error(network, x, levels(3, 5.0), method) < 1e-5
    double = ig.load_prior("natural-tiny").double()
    assert error(double, x[:1].double(), levels(2, 5.0, 0.1), method) < 1e-12


def test_equals_full_back_propagation_over_many_network_calls(network: Prior):
    assert error(network, 5 * torch.randn(1, 3, 32, 32), levels(64, 5.0), "euler") < 1e-5


@pytest.mark.parametrize("every", [2, 3, 100])
@pytest.mark.parametrize("method", ["euler", "rk4", "dpm++2m"])
def test_checkpoints(method: str, every: int):
    x = 10 * torch.randn(4, 3, dtype=torch.float64)
    assert error(mixture(), x, levels(7), method, checkpoint_every=every) < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_order_of_convergence(method: str):
    """The flow of a Gaussian is x -> x sqrt((s^2 + b^2) / (s^2 + a^2)); half the step, an error 2^order smaller."""
    prior = Gaussian(torch.zeros(2), 0.49 * torch.eye(2, dtype=torch.float64))
    x = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    exact = x * ((0.49 + 0.2**2) / (0.49 + 2.0**2)) ** 0.5
    errors = []
    for n in (40, 80):
        # Equal steps in log sigma, where every method has a smooth error.
        sigmas = torch.logspace(math.log10(2.0), math.log10(0.2), n + 1, dtype=torch.float64)
        errors.append(float((rollout(prior, x, sigmas, method) - exact).norm()))
    assert math.log2(errors[0] / errors[1]) > ORDER[method] - 0.3


class Toy(Prior):
    """A denoiser with a parameter and a condition, both differentiable."""

    shape = (3,)
    sigma_min, sigma_max = 0.01, 10.0

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64))
        self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
        s = per_sample(sigma, x) ** 2
        return (x + s * (condition["shift"] + torch.tanh(self.weight * x))) / (1 + s)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "dpm++2s", "dpm++2m"])
def test_gradients_of_conditions_and_parameters(method: str, every: int):
    prior, sigmas = Toy(), levels(7)
    x = torch.randn(4, 3, dtype=torch.float64)
    shift = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def both(end: Tensor) -> Tensor:
        return loss(end) + (prior.weight * end).sum(1)  # a loss may see them too

    start = x.clone().requires_grad_()
    value = both(naive(prior, start, sigmas, method, shift=shift))
    expected = torch.autograd.grad(value.sum(), (start, shift, prior.weight))
    _, gradient, others = rollout_gradient(
        prior,
        x,
        sigmas,
        both,
        method,
        condition={"shift": shift},
        wrt=(shift, prior.weight, prior.unused),
        checkpoint_every=every,
    )
    for found, right in zip((gradient, *others), expected, strict=False):
        assert distance(found, right) < 1e-12
    assert torch.equal(others[2], torch.zeros(2))


def test_rollout_inside_a_larger_graph():
    """x itself comes from a parameter, gradients are taken twice, and a second derivative is refused."""
    prior, sigmas = mixture(), levels(5)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 3, dtype=torch.float64)
    expected = torch.autograd.grad(loss(naive(prior, scale * x, sigmas, "heun")).sum(), scale)[0]
    value = loss(rollout(prior, scale * x, sigmas, "heun")).sum()
    for _ in range(2):
        (found,) = torch.autograd.grad(value, scale, retain_graph=True)
        assert distance(found, expected) < 1e-12
    (first,) = torch.autograd.grad(value, scale, create_graph=True)
    with pytest.raises(RuntimeError):  # torch says why: its function is once differentiable
        first.backward()


def test_nothing_is_kept_where_no_gradient_is_wanted():
    kept = []

    class Watched(Gaussian):
        def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
            denoised = super().denoise(x, sigma, **condition)
            kept.append(weakref.ref(denoised))
            return denoised

    x = torch.randn(2, 3)
    end = rollout(Watched(torch.zeros(3), torch.eye(3)), x, levels(9), "rk4")
    assert not end.requires_grad
    assert not [ref for ref in kept if ref() is not None]


def test_rows_are_independent():
    prior, sigmas = mixture(), levels(6)
    x = 5 * torch.randn(5, 3, dtype=torch.float64)
    _, together = rollout_gradient(prior, x, sigmas, loss, "rk4")
    alone = [rollout_gradient(prior, row[None], sigmas, loss, "rk4")[1] for row in x]
    assert distance(torch.cat(alone), together) < 1e-13


def test_autocast_is_entered_again():
    """Bfloat16 on the way there and float32 on the way back would be two different roll-outs."""
    called = []

    class Linear(Prior):
        shape = (8,)
        matrix = torch.randn(8, 8) / 8

        def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
            denoised = x @ self.matrix
            called.append(denoised.dtype)
            return denoised.to(x.dtype)

    x = torch.randn(2, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        end = rollout(Linear(), x, levels(3))
    loss(end).sum().backward()
    assert called == [torch.bfloat16] * 6


# ---- for solvers


def test_rollout_in_a_problem_counts_calls():
    problem = Problem(mixture(), reward=as_reward(loss))
    x = 5 * torch.randn(4, 3, dtype=torch.float64)
    start = x.clone().requires_grad_()
    end = rollout_in(problem, start, levels(5), "heun")
    assert torch.equal(end, rollout(problem.prior, x, levels(5), "heun"))
    assert (problem.counters.network, problem.counters.vjp) == (4 * 9, 0)
    torch.autograd.grad(end.sum(), start)
    assert (problem.counters.network, problem.counters.vjp) == (4 * 18, 4 * 9)


@pytest.mark.parametrize("method", ["euler", "heun", "dpm++2m"])
def test_guide_through(method: str):
    prior, sigmas = mixture(), levels(4)
    problem = Problem(prior, reward=as_reward(loss))
    x = 5 * torch.randn(4, 3, dtype=torch.float64)
    start = x.clone().requires_grad_()
    end = naive(prior, start, sigmas, method)
    value = loss(end)
    slope, gradient = torch.autograd.grad(value.sum(), (end, start))
    denoised, guidance = guide_through(problem, x, sigmas, method)
    assert torch.equal(denoised, prior.denoise(x, sigmas[0]))
    found = (guidance.denoised, guidance.log_prob, guidance.slope, guidance.gradient)
    for ours, theirs in zip(found, (end, value, slope, gradient), strict=True):
        assert distance(ours, theirs) < 1e-12
    assert not any(t.requires_grad for t in guidance)


def test_one_step_to_zero_is_the_denoiser():
    problem = Problem(mixture(), reward=as_reward(loss))
    x = 5 * torch.randn(4, 3, dtype=torch.float64)
    expected = problem.guide(x, 3.0)
    denoised, found = guide_through(problem, x, [3.0, 0.0])
    assert torch.equal(denoised, expected.denoised)
    assert all(
        map(torch.equal, (found.gradient, found.slope), (expected.gradient, expected.slope))
    )


# ---- the published form, and planted bugs


def published(prior: Prior, x: Tensor, sigmas: list[float], method: str, rule: bool) -> Tensor:
    """Gradient of `loss` by the partitioned method of Matsubara et al. 2021, eq. 7, which divides by b_i."""
    nodes, a, b = TABLEAUS[method]

    def slope(point: Tensor, s: float) -> Tensor:
        return (point - prior.denoise(point, point.new_tensor(s))) / s

    history = []
    for s, t in pairwise(sigmas):
        points: list[Tensor] = []
        stages: list[Tensor] = []
        for c, row in zip(nodes, a, strict=True):
            points.append(x + sum(((t - s) * w * k for w, k in zip(row, stages)), 0 * x))
            stages.append(slope(points[-1], s + c * (t - s)))
        history.append((s, t - s, points))
        x = x + sum(((t - s) * w * k for w, k in zip(b, stages)), 0 * x)
    end = x.detach().requires_grad_()
    (total,) = torch.autograd.grad(loss(end).sum(), end)
    for s, h, points in reversed(history):
        # A stage of weight 0 gets weight h, and a formula of its own; without the rule it is left out.
        tilde = [w or (h if rule else 0.0) for w in b]
        pulled: dict[int, Tensor] = {}
        for i in reversed(range(len(b))):
            inner = sum((tilde[j] * a[j][i] * pulled[j] for j in pulled), 0 * x)
            if b[i]:
                inner = total + h / b[i] * inner
            point = points[i].detach().requires_grad_()
            (pulled[i],) = torch.autograd.grad(slope(point, s + nodes[i] * h), point, inner)
        total = total + sum((h * tilde[i] * pulled[i] for i in pulled), 0 * x)
    return total


@pytest.mark.parametrize("method", TABLEAUS)
def test_is_the_published_partitioned_method(method: str):
    prior, x = mixture(), 3 * torch.randn(4, 3, dtype=torch.float64)
    sigmas = levels(6, end=0.02)
    _, found = rollout_gradient(prior, x, sigmas, loss, method)
    assert distance(published(prior, x, sigmas, method, rule=True), found) < 1e-11
    broken = distance(published(prior, x, sigmas, method, rule=False), found)
    assert broken > 1e-2 if 0.0 in TABLEAUS[method][2] else broken < 1e-11


def mutant(tmp_path: Path, old: str, new: str) -> ModuleType:
    """The module `adjoint` with one piece of its source replaced."""
    source = Path(adjoint.__file__).read_text("utf-8")
    assert source.count(old) == 1, old
    path = tmp_path / "mutant.py"
    path.write_text(source.replace(old, new), "utf-8")
    spec = importlib.util.spec_from_file_location("mutant", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MUTANTS = {
    # A stage without weight in the end (b_i = 0) reaches it only through the stages after it.
    "b = 0": ("bars[j] = bars[j] + q * point_bar", "pass", "midpoint"),
    "stages": ("bars[j] = bars[j] + q * point_bar", "pass", "rk4"),
    "history": ("bars[0] = bars[0] + carried", "pass", "dpm++2m"),
    "history weight": ("step.end.r * bar", "bar", "dpm++2m"),
    "scale of x": ("row.p * point_bar", "point_bar", "heun"),
    "end": ("x_bar = step.end.p * bar", "x_bar = bar", "euler"),
    "order": (
        "for i in reversed(range(len(step.levels))):",
        "for i in range(len(step.levels)):",
        "rk4",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bugs_are_caught(name: str, tmp_path: Path):
    old, new, method = MUTANTS[name]
    x = 5 * torch.randn(4, 3, dtype=torch.float64)
    assert error(mixture(), x, levels(5), method) < 1e-12
    assert error(mixture(), x, levels(5), method, mutant(tmp_path, old, new)) > 1e-3


# ---- memory


class LiveBytes:
    """Bytes that autograd keeps for backward at one time, and their peak; parameters are there anyway."""

    def __init__(self, prior: Prior) -> None:
        self.now = self.peak = 0
        self.free = {p.untyped_storage().data_ptr() for p in prior.parameters()}
        self.copies: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> list[Tensor]:
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        box = Box([tensor.detach()])
        if key not in self.free:
            if not self.copies.get(key):
                self.now += size
            self.copies[key] = self.copies.get(key, 0) + 1
            self.peak = max(self.peak, self.now)
            weakref.finalize(box, self.drop, key, size)
        return box

    def drop(self, key: int, size: int) -> None:
        self.copies[key] -= 1
        if not self.copies[key]:
            self.now -= size

    @staticmethod
    def unpack(box: list[Tensor]) -> Tensor:
        return box[0]


class Box(list):
    """A list that can be referred to weakly."""


def live(prior: Prior, gradient: Callable[[], object]) -> int:
    count = LiveBytes(prior)
    with torch.autograd.graph.saved_tensors_hooks(count.pack, count.unpack):
        gradient()
    return count.peak


def back_propagate(prior: Prior, x: Tensor, sigmas: list[float], method: str) -> None:
    start = x.clone().requires_grad_()
    loss(naive(prior, start, sigmas, method)).sum().backward()


@pytest.mark.parametrize("method", ["euler", "rk4", "dpm++2m"])
def test_one_network_graph_is_alive_whatever_the_steps(method: str, network: Prior):
    """To the byte: what autograd keeps for 8 steps is what it keeps for 2; in full back-propagation four times that."""
    x = torch.randn(1, 3, 32, 32)
    ours, full = (
        [
            live(network, partial(run, network, x, levels(n, end=0.01), *arguments))
            for n in (1, 2, 8)
        ]
        for run, arguments in ((rollout_gradient, (loss, method)), (back_propagate, (method,)))
    )
    assert len(set(ours)) == 1
    assert full[2] / full[1] == pytest.approx(4, rel=0.05)
    assert full[0] >= ours[0] > 0.9 * full[0] / len(make_steps([1.0, 0.5], method)[0].levels)


@pytest.mark.parametrize(("every", "states"), [(1, 12), (4, 3 + 4), (12, 1 + 12)])
def test_states_that_are_kept(every: int, states: int):
    """One state per step, or one per segment and one per step of the segment that is under way."""
    seen: list[weakref.ref] = []
    most = 0

    class Watched(Gaussian):
        def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
            nonlocal most
            most = max(most, sum(ref() is not None for ref in seen))
            return super().denoise(x, sigma, **condition)

    class Planted(tableaus.Combination):
        def __call__(self, *arguments) -> Tensor:
            end = super().__call__(*arguments)
            seen.append(weakref.ref(end))
            return end

    prior = Watched(torch.zeros(3), torch.eye(3))
    steps = [s._replace(end=Planted(*s.end)) for s in make_steps(levels(12), "euler")]
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    end = adjoint._apply(lambda p, s: prior.denoise(p, s), steps, every, (), x)
    end.sum().backward()
    assert most <= states + 1  # and the one that is being made


# ---- what is refused


def gradient_of(function: Callable[[Tensor], Tensor], sigmas=(2.0, 1.0, 0.0), **more):
    prior = more.pop("prior", None) or Gaussian(torch.zeros(3), torch.eye(3))
    return rollout_gradient(prior, torch.randn(2, 3), sigmas, function, **more)


scorer = nn.Linear(3, 1)


def double_in_place(x: Tensor) -> Tensor:
    x *= 2
    return x.sum(1)


LOSSES = {
    "a mean over the batch": (
        lambda x: x.mean(),
        ShapeError,
        r"shape \(\) for 2 samples; expected \(2,\)",
    ),
    "no sum": (lambda x: x, ShapeError, r"shape \(2, 3\) for 2 samples"),
    "numpy": (lambda x: x.detach().numpy().sum(1), InputError, "returned a ndarray"),
    "a number": (lambda x: 1.0, InputError, "returned a float"),
    "complex": (lambda x: x.sum(1) * 1j, InputError, "returned complex numbers"),
    "NaN": (lambda x: (x.sum(1) * 0).log() * 0, InputError, "loss of sample 0 is nan"),
    "infinite": (lambda x: x.sum(1) / 0, InputError, "loss of sample 0 is -?inf"),
    "constant": (lambda x: torch.zeros(2), InputError, "gradient of the loss is None.*SCG"),
    "detached": (lambda x: x.detach().sum(1), InputError, "detached from its input.*SCG"),
    "argmax": (lambda x: x.argmax(1), InputError, "gradient of the loss is None"),
    "detached before a network": (
        lambda x: scorer(x.detach())[:, 0],
        InputError,
        "gradient of the loss is None",
    ),
    "in place": (double_in_place, InputError, "changes its input in place"),
    "root at 0": (
        lambda x: (x - x.detach()).norm(dim=1) + (0 * x).square().sum(1).sqrt(),
        InputError,
        "gradient of the loss of sample 0 is not finite",
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_are_refused(name: str):
    function, kind, message = LOSSES[name]
    with pytest.raises(kind, match=message):
        gradient_of(function)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigmas": [1.0]}, "1 levels; a roll-out of n >= 1 steps"),
        ({"sigmas": []}, "0 levels"),
        ({"sigmas": [1.0, 2.0]}, "decrease strictly"),
        ({"sigmas": [1.0, 1.0, 0.0]}, "decrease strictly"),
        ({"sigmas": [1.0, -1.0]}, "the last >= 0"),
        ({"sigmas": [math.nan, 0.0]}, "decrease strictly"),
        ({"sigmas": [math.inf, 0.0]}, "finite levels"),
        ({"sigmas": [[1.0, 0.0]]}, r"sigmas has shape \(1, 2\)"),
        ({"method": "rk5"}, "unknown method 'rk5'; did you mean 'rk4'"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0"),
        ({"wrt": [torch.zeros(2)]}, r"shape \(2,\), does not require gradients"),
    ],
)
def test_arguments_that_are_refused(arguments: dict, message: str):
    with pytest.raises(InputError, match=message):
        gradient_of(loss, **arguments)


@pytest.mark.parametrize("every", [1, 2])
def test_a_denoiser_that_is_not_deterministic_is_refused(every: int):
    """Dropout that is on: two calls at one point disagree, and no gradient belongs to them."""
    net = nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.1), nn.Linear(64, 3))
    prior = from_network(lambda x, _: net(x), predicts="x0", schedule="ve", shape=(3,))
    net.eval()
    gradient_of(loss, prior=prior, checkpoint_every=every)
    net.train()
    with pytest.raises(InputError, match=r"two answers for the same x.*dropout off"):
        gradient_of(loss, prior=prior, checkpoint_every=every)


def test_a_row_that_is_not_finite_is_named_and_leaves_the_others_alone():
    prior, sigmas = mixture(), levels(3)
    x = torch.randn(3, 3, dtype=torch.float64)
    broken = x.clone()
    broken[1, 0] = math.nan
    with pytest.raises(InputError, match=r"loss of sample 1 is nan.*end is not finite itself"):
        rollout_gradient(prior, broken, sigmas, loss)
    problem = Problem(prior, reward=as_reward(loss))
    right, found = (guide_through(problem, start, sigmas)[1].gradient for start in (x, broken))
    assert torch.equal(found[[0, 2]], right[[0, 2]])
    assert found[1].isnan().any()
