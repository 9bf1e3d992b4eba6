"""Networks made from an exact denoiser by each family's own formula: from_network must recover that denoiser."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from invguide.api import load_prior
from invguide.errors import InputError, ShapeError
from invguide.priors import Gaussian, from_network

T = 1000
SHAPE = (2, 3, 4)
SIGMA_DATA = 0.7


def betas(name: str) -> np.ndarray:
    if name == "linear-vp":
        return np.linspace(1e-4, 0.02, T)
    if name == "scaled-linear-vp":
        return np.linspace(math.sqrt(0.00085), math.sqrt(0.012), T) ** 2
    bar = [math.cos((i / T + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(T + 1)]
    return np.array([min(1 - bar[i + 1] / bar[i], 0.999) for i in range(T)])


ALPHAS_BAR = {
    name: np.cumprod(1 - betas(name)) for name in ("linear-vp", "scaled-linear-vp", "cosine-vp")
}
ALPHAS_BAR["table"] = 1 / (1 + np.geomspace(0.02, 30, 12) ** 2)


def exact_prior() -> Gaussian:
    torch.manual_seed(0)
    root = torch.randn(24, 24, dtype=torch.float64)
    return Gaussian(torch.randn(SHAPE), root @ root.mT / 24 + 0.1 * torch.eye(24))


class Network(nn.Module):
    """The exact posterior mean, dressed as a network of one family.

    Written in the family's own variables (scaled input x_t, its own clock), from its papers.
    """

    def __init__(self, predicts: str, schedule: str) -> None:
        super().__init__()
        self.prior = exact_prior()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.predicts, self.schedule = predicts, schedule
        self.times: list[Tensor] = []

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (len(x_t),)
        self.times.append(t)

        def wide(value: Tensor) -> Tensor:
            return value.reshape(-1, 1, 1, 1)

        if self.schedule in ALPHAS_BAR:  # x_t = alpha x0 + noise n
            bar = ALPHAS_BAR[self.schedule]
            table = 0.5 * np.log((1 - bar) / bar)
            sigma = torch.from_numpy(np.exp(np.interp(t.numpy(), np.arange(len(bar)), table)))
            alpha = 1 / (1 + sigma**2).sqrt()
        elif self.schedule == "ve":
            sigma, alpha = t, torch.ones_like(t)
        elif self.schedule == "edm":
            sigma = (4 * t).exp()
            alpha = 1 / (sigma**2 + SIGMA_DATA**2).sqrt()
        else:
            sigma, alpha = t / (1 - t), 1 - t
        noise = wide(alpha * sigma)
        alpha = wide(alpha)
        x0 = self.weight * self.prior.denoise(x_t / alpha, sigma)
        n = (x_t - alpha * x0) / noise
        match self.predicts:
            case "eps":
                return n
            case "x0":
                return x0
            case "v":
                return alpha * n - noise * x0
            case "score":
                return -n / noise
            case "flow":
                return n - x0
        # EDM, equation 7 solved for F.
        s2, d2 = wide(sigma) ** 2, SIGMA_DATA**2
        x = x_t / alpha
        return (x0 - d2 / (s2 + d2) * x) * (s2 + d2).sqrt() / (wide(sigma) * SIGMA_DATA)


PAIRS = [
    *((predicts, vp) for vp in ALPHAS_BAR for predicts in ("eps", "v", "x0", "score")),
    *((predicts, "ve") for predicts in ("eps", "x0", "score")),
    *((predicts, "edm") for predicts in ("edm", "eps", "x0")),
    *((predicts, "flow") for predicts in ("flow", "eps", "x0", "score")),
]


def wrap(net: Callable[..., Any], predicts: str, schedule: str, **options: Any) -> Any:
    table = torch.from_numpy(ALPHAS_BAR["table"]) if schedule == "table" else schedule
    return from_network(net, predicts, table, SHAPE, sigma_data=SIGMA_DATA, **options)


def levels_for(schedule: str) -> Tensor:
    """Levels on the table and between its levels, within the range."""
    if schedule in ALPHAS_BAR:
        sigmas = np.sqrt((1 - ALPHAS_BAR[schedule]) / ALPHAS_BAR[schedule])
        sigmas = sigmas[sigmas < 190]
        on = sigmas[np.linspace(0, len(sigmas) - 1, 9).astype(int)]
        return torch.from_numpy(np.sort(np.concatenate([on, np.sqrt(on[1:] * on[:-1])])))
    return torch.logspace(math.log10(0.003), math.log10(79), 17, dtype=torch.float64)


def worst_error(prior: Any, schedule: str) -> float:
    exact, sigma = exact_prior(), levels_for(schedule)
    x = exact.sample(len(sigma)) + sigma.reshape(-1, 1, 1, 1) * torch.randn(len(sigma), *SHAPE)
    with torch.no_grad():
        return float((prior.denoise(x, sigma) - exact.denoise(x, sigma)).abs().max())


@pytest.mark.parametrize(("predicts", "schedule"), PAIRS)
def test_recovers_the_denoiser_on_and_between_the_levels(predicts: str, schedule: str):
    assert worst_error(wrap(Network(predicts, schedule), predicts, schedule), schedule) < 1e-6


@pytest.mark.parametrize(("predicts", "schedule"), PAIRS)
def test_the_recovery_test_can_fail(predicts: str, schedule: str):
    """Sign of the output, and a network trained in another convention."""
    net = Network(predicts, schedule)
    assert worst_error(wrap(lambda x, t: -net(x, t), predicts, schedule), schedule) > 1e-2
    other = "x0" if predicts != "x0" else "eps"
    assert worst_error(wrap(Network(other, schedule), predicts, schedule), schedule) > 1e-2


@pytest.mark.parametrize("schedule", ["linear-vp", "scaled-linear-vp", "cosine-vp"])
def test_nearest_level_would_be_noticed(schedule: str):
    net = Network("eps", schedule)
    assert worst_error(wrap(lambda x, t: net(x, t.round()), "eps", schedule), schedule) > 1e-4


@pytest.mark.parametrize("schedule", ["linear-vp", "scaled-linear-vp", "cosine-vp", "table"])
def test_steps_and_pred_xstart_of_ddpm(schedule: str):
    """At level k the network is called at step k, and D is DDPM's x0 prediction (its eq. 15)."""
    bar = ALPHAS_BAR[schedule]
    net = Network("eps", schedule)
    prior = wrap(net, "eps", schedule, sigma_max=1e6)
    steps = np.arange(len(bar))
    sigma = torch.from_numpy(np.sqrt((1 - bar) / bar))
    x_t = torch.randn(len(bar), *SHAPE, dtype=torch.float64)
    a, b = (
        torch.from_numpy(v).reshape(-1, 1, 1, 1) for v in (np.sqrt(1 / bar), np.sqrt(1 / bar - 1))
    )
    actual = prior.denoise(a * x_t, sigma)
    np.testing.assert_allclose(net.times[-1], steps, atol=1e-8)
    expected = a * x_t - b * net(x_t, torch.from_numpy(steps).double())
    assert float(((actual - expected) / a).abs().max()) < 1e-9
    if schedule == "linear-vp":
        assert (float(sigma[0]), float(sigma[-1])) == pytest.approx((0.0100, 157.41), rel=1e-3)


def test_ranges():
    def limits(schedule: str, predicts: str = "eps", **options: Any) -> tuple[float, float]:
        prior = wrap(Network(predicts, schedule), predicts, schedule, **options)
        return prior.sigma_min, prior.sigma_max

    assert limits("linear-vp") == pytest.approx((0.0100, 157.41), rel=1e-3)
    assert limits("scaled-linear-vp") == pytest.approx((0.0292, 14.61), rel=2e-3)
    assert limits("cosine-vp") == pytest.approx(
        (0.00643, 200.0), rel=1e-3
    )  # the table goes to 2e4
    assert limits("ve") == limits("edm") == (0.002, 80.0)
    assert limits("flow") == (0.001, 200.0)
    assert limits("ve", sigma_min=0.01, sigma_max=378.0) == (0.01, 378.0)


def test_sigma_above_the_range_is_an_error_and_below_calls_at_sigma_min():
    net = Network("eps", "linear-vp")
    prior = wrap(net, "eps", "linear-vp")
    x = torch.randn(2, *SHAPE, dtype=torch.float64)
    with pytest.raises(
        InputError, match=r"sigma = 158 is above the range of this prior, \[0\.01, 157\.4\]"
    ):
        prior.denoise(x, torch.tensor([1.0, 158.0]))
    prior.denoise(x.float(), torch.tensor(prior.sigma_max))  # rounded to float32
    torch.testing.assert_close(prior.denoise(x, 0.0), x)
    assert net.times[-1].tolist() == [0.0, 0.0]
    exact = exact_prior().denoise(x, 0.001)
    error, stuck = (
        prior.denoise(x, 0.001) - exact,
        exact_prior().denoise(x, prior.sigma_min) - exact,
    )
    assert error.abs().max() < 0.2 * stuck.abs().max()  # than if all of it were taken at sigma_min


@pytest.mark.parametrize("schedule", ["ve", "edm", "flow"])
def test_below_the_range_the_clock_stands_still(schedule: str):
    net = Network("x0", schedule)
    prior = wrap(net, "x0", schedule)
    x = torch.randn(3, *SHAPE, dtype=torch.float64)
    prior.denoise(
        x, torch.tensor([0.0, prior.sigma_min / 2, prior.sigma_min], dtype=torch.float64)
    )
    assert net.times[-1].isfinite().all()
    assert torch.equal(net.times[-1], net.times[-1][2:].expand(3))


def test_zero_terminal_snr_and_exact_ends_are_left_out():
    bar = torch.cat([torch.ones(1), torch.from_numpy(ALPHAS_BAR["table"]), torch.zeros(1)])
    prior = from_network(lambda x, t: t[:, None] + 0 * x, "x0", bar, (3,))
    assert (prior.sigma_min, prior.sigma_max) == pytest.approx((0.02, 30.0))
    assert float(prior.denoise(torch.zeros(1, 3).double(), 0.02)[0, 0]) == pytest.approx(1)
    assert float(prior.denoise(torch.zeros(1, 3).double(), 30.0)[0, 0]) == pytest.approx(12)


def test_learned_variance_is_dropped():
    net = Network("eps", "linear-vp")
    x, sigma = torch.randn(3, *SHAPE, dtype=torch.float64), 0.8
    expected = wrap(net, "eps", "linear-vp").denoise(x, sigma)
    both = wrap(lambda x, t: torch.cat([net(x, t), x + 7], 1), "eps", "linear-vp")
    torch.testing.assert_close(both.denoise(x, sigma), expected)
    swapped = wrap(lambda x, t: torch.cat([x + 7, net(x, t)], 1), "eps", "linear-vp")
    assert (swapped.denoise(x, sigma) - expected).abs().max() > 1


def test_outputs_of_other_libraries():
    net = Network("eps", "linear-vp")
    x = torch.randn(3, *SHAPE, dtype=torch.float64)
    expected = wrap(net, "eps", "linear-vp").denoise(x, 0.8)
    for dress in (lambda out: SimpleNamespace(sample=out), lambda out: (out,)):
        dressed = wrap(lambda x, t, dress=dress: dress(net(x, t)), "eps", "linear-vp")
        torch.testing.assert_close(dressed.denoise(x, 0.8), expected)
    with pytest.raises(ShapeError, match=r"returned \(3, 1, 3, 4\)"):
        wrap(lambda x, t: x[:, :1], "eps", "linear-vp").denoise(x, 0.8)


@pytest.mark.parametrize(
    ("size", "mode"), [((16, 24), None), ((13, 22), "reflect"), ((3, 9), "edge"), ((1, 1), "edge")]
)
def test_free_sizes_are_padded_to_a_multiple_and_cropped(size: tuple[int, int], mode: str | None):
    seen: list[Tensor] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        return x

    prior = from_network(net, "x0", "ve", (1, None, None), multiple=8)
    x = torch.randn(2, 1, *size)
    torch.testing.assert_close(prior.denoise(x, 0.5), x)
    extra = [(0, -n % 8) for n in size]
    expected = (
        x.numpy() if mode is None else np.pad(x.numpy(), [(0, 0), (0, 0), *extra], mode=mode)
    )  # pyright: ignore[reportCallIssue, reportArgumentType]
    np.testing.assert_array_equal(seen[0], expected)


def test_fixed_sizes_are_not_padded():
    seen: list[torch.Size] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x.shape)
        return x

    from_network(net, "x0", "ve", (1, 28, None)).denoise(torch.zeros(2, 1, 28, 30), 0.5)
    from_network(net, "x0", "ve", (5,)).denoise(torch.zeros(2, 5), 0.5)
    assert seen == [(2, 1, 28, 32), (2, 5)]


def test_frozen_in_evaluation_mode_and_differentiable_in_x():
    net = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Dropout(0.5))
    module = SimpleNamespace(calls=0)

    class Timed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
            module.calls += 1
            return self.net(x) + label[:, None, None, None]

    prior = wrap(Timed(), "eps", "linear-vp")
    prior.train()
    assert not any(part.training for part in prior.modules())
    assert not any(p.requires_grad for p in prior.parameters())
    assert prior.dtype == torch.float32
    x = torch.randn(2, *SHAPE, requires_grad=True)
    label = torch.tensor([0, 3])
    first = prior.denoise(x, 0.5, label=label)
    torch.testing.assert_close(first, prior.denoise(x, torch.tensor([0.5, 0.5]), label=label))
    (gradient,) = torch.autograd.grad(first[0].sum(), x)
    assert gradient[0].abs().max() > 0
    assert gradient[1].abs().max() == 0  # rows are independent
    with pytest.raises(
        InputError,
        match="given label, other; of conditions, its network Timed takes label, of which",
    ):
        prior.denoise(x, 0.5, label=label, other=label)
    with pytest.raises(InputError, match=r"given no conditions; .* it needs label"):
        prior.denoise(x, 0.5)


def test_gradient_is_exact():
    prior = wrap(Network("v", "linear-vp"), "v", "linear-vp")
    x = torch.randn(1, *SHAPE, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: prior.denoise(v, 0.6), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_network_in_another_type(dtype: torch.dtype):
    """The network works in its own type; levels stay exact, and the state keeps its type."""
    net = nn.Conv2d(2, 2, 1).to(dtype)
    seen: list[torch.dtype] = []

    class Timed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            seen.extend((x.dtype, t.dtype))
            return self.net(x)

    x = torch.randn(2, *SHAPE, dtype=torch.float64)
    assert wrap(Timed(), "eps", "linear-vp").denoise(x, 0.5).dtype == torch.float64
    assert seen == [dtype, torch.float32]


def test_units_and_time_scale():
    net = Network("flow", "flow")
    prior = wrap(lambda x, t: net(x, t / 1000), "flow", "flow", time_scale=1000.0)
    assert worst_error(prior, "flow") < 1e-6
    ends = torch.tensor([-1.0, 1.0])
    assert prior.to_data(ends).tolist() == [0.0, 1.0]
    assert prior.to_normalised(torch.tensor([0.0, 1.0])).tolist() == [-1.0, 1.0]
    assert (wrap(net, "flow", "flow", data_range=(0.0, 1.0)).scale, prior.shift) == (1.0, 0.5)


def nothing(x: Tensor, t: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"predicts": "epsilon"}, "predicts='epsilon': did you mean 'eps'"),
        ({"predicts": "w"}, "choose one of: edm, eps, flow, score, v, x0"),
        ({"schedule": "linear"}, "did you mean 'linear-vp'"),
        ({"predicts": "v", "schedule": "flow"}, "velocity n - x0 is predicts='flow'"),
        ({"predicts": "edm"}, "no meaning with schedule 'linear-vp'"),
        ({"schedule": torch.tensor([0.1, 0.5, 0.9])}, r"Pass alphas_bar\.flip\(0\)"),
        ({"schedule": torch.tensor([0.9, 0.1, 0.5])}, "decrease strictly"),
        ({"schedule": torch.tensor([1.2, 0.1])}, r"lie in \[0, 1\]"),
        ({"schedule": torch.tensor(0.5)}, r"must be \(T,\)"),
        ({"data_range": (1.0, -1.0)}, "data_range"),
        ({"multiple": 0}, "multiple is 0; expected a whole number of at least 1"),
        ({"sigma_min": 3.0, "sigma_max": 2.0}, "got 3 and 2"),
    ],
)
def test_errors(arguments: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        from_network(nothing, **arguments)


def test_wrong_shape_of_x():
    prior = from_network(nothing, shape=(3, None, 8))
    for shape in ((2, 3, 8, 9), (2, 1, 8, 8), (3, 8, 8)):
        with pytest.raises(ShapeError, match=r"takes x of shape \(B, 3, any, 8\)"):
            prior.denoise(torch.zeros(shape), 1.0)


# ---- optimise


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Rounding of one weight or activation is 2^-8 in bf16 and 2^-11 in fp16; it accumulates over some 25 layers.
    [("fp32", 1e-5), ("bf16", 3e-2), ("fp16", 4e-3)],
)
def test_optimise_keeps_the_denoiser(dtype: str, tolerance: float) -> None:
    plain, fast = load_prior("natural-tiny"), load_prior("natural-tiny")
    assert fast.optimise(dtype) is fast
    x = torch.randn(2, 3, 40, 36, generator=torch.Generator().manual_seed(0))
    for sigma in (0.05, 0.7, 10.0):
        difference = (fast.denoise(x, sigma) - plain.denoise(x, sigma)).norm()
        size = sigma / (1 + sigma) * x.norm()  # of sigma times the network's output
        assert difference < tolerance * size
        if dtype != "fp32":
            assert difference > 0  # half precision is really on
    assert fast.denoise(x, 0.7).dtype == x.dtype
    assert fast.denoise(x, 0.7).is_contiguous()
    assert set(fast.state_dict()) == set(plain.state_dict())


def test_optimise_is_differentiable_in_half_precision() -> None:
    plain, fast = load_prior("natural-tiny"), load_prior("natural-tiny").optimise("bf16")
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    gradients = []
    for prior in (plain, fast):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(prior.denoise(leaf, 0.5).square().sum(), leaf)
        assert gradient.dtype == torch.float32
        gradients.append(gradient)
    assert (gradients[1] - gradients[0]).norm() < 3e-2 * gradients[0].norm()


def test_optimise_refuses_what_it_cannot_do() -> None:
    with pytest.raises(InputError, match=r"unknown dtype 'bf61'; did you mean 'bf16'"):
        load_prior("natural-tiny").optimise("bf61")
    function = from_network(lambda x, t: x, predicts="x0", schedule="ve", shape=(2,))
    with pytest.raises(InputError, match="plain function"):
        function.optimise("bf16", compile=True)
    with pytest.raises(InputError, match="Gaussian has no network"):
        Gaussian(torch.zeros(2), torch.eye(2)).optimise()
