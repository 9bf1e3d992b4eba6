"""The prior doctor: exact and trained denoisers, dressed by each family's formula, rightly and wrongly told."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import invguide as ig
from invguide.cli.terminal import app
from invguide.errors import InputError, ShapeError
from invguide.prior import Prior
from invguide.priors import GaussianField, GaussianMixture, NetworkPrior, from_network
from invguide.priors import known_images as pictures
from invguide.priors.doctor.convention import Convention
from invguide.priors.doctor.examine import examine, linear_error
from invguide.priors.known_images import known_images
from invguide.priors.networks.adm import Attention
from invguide.priors.networks.clocks import cosine_betas, linear_betas, scaled_linear_betas
from invguide.priors.networks.labels import WithLabels

SIGMA_DATA = 0.5
LEVELS = {  # sigma of every step
    name: (1 / (1 - betas).cumprod(0) - 1).sqrt()
    for name, betas in (
        ("linear-vp", linear_betas()),
        ("scaled-linear-vp", scaled_linear_betas()),
        ("cosine-vp", cosine_betas()),
    )
}


class Network(nn.Module):
    """A prior's denoiser, dressed as a network of one convention, in that convention's own variables."""

    def __init__(self, prior: Prior, truth: Convention) -> None:
        super().__init__()
        self.prior, self.truth = prior, truth

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (
            v.float().reshape(-1, *(1,) * (x_t.ndim - 1)) for v in self._level(t.double())
        )
        x = x_t / alpha
        low, high = self.truth.data_range
        x_data, sigma_data = (x - low) / (high - low), sigma / (high - low)
        level = (sigma_data / self.prior.scale).clamp(self.prior.sigma_min, self.prior.sigma_max)
        denoised = self.prior.denoise(self.prior.to_normalised(x_data), level.flatten())
        x0 = low + (high - low) * self.prior.to_data(denoised)
        n = (x - x0) / sigma
        match self.truth.predicts:
            case "eps":
                return n
            case "x0":
                return x0
            case "v":
                return alpha * (n - sigma * x0)
            case "score":
                return -n / (alpha * sigma)
            case "flow":
                return x0 - n if self.truth.reverse_time else n - x0
        total = sigma**2 + SIGMA_DATA**2
        return (x0 - SIGMA_DATA**2 / total * x) * total.sqrt() / (sigma * SIGMA_DATA)

    def _level(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) of the input alpha (x0 + sigma n); out of its range a network still says something."""
        t = t / self.truth.time_scale
        name = self.truth.schedule
        if name in LEVELS:
            t = (999 - t if self.truth.reverse_time else t).clamp(0, 999)
            k = t.long().clamp_max(998)
            table = LEVELS[name].log()
            sigma = (table[k] + (t - k) * (table[k + 1] - table[k])).exp()
            return (1 + sigma**2).rsqrt(), sigma
        if name == "ve":
            sigma = t.clamp(1e-3, 200)
            return torch.ones_like(sigma), sigma
        if name == "edm":
            sigma = (4 * t).clamp(-7, 5).exp()
            return (sigma**2 + SIGMA_DATA**2).rsqrt(), sigma
        t = (1 - t if self.truth.reverse_time else t).clamp(1e-3, 0.995)
        return 1 - t, t / (1 - t)


def field() -> tuple[Prior, tuple[int | None, ...], Tensor]:
    prior = GaussianField((1, 8, 8), scale=0.2, shift=0.45).float()
    return prior, (1, 8, 8), prior.to_data(prior.sample(16)).float()


def mixture() -> tuple[Prior, tuple[int | None, ...], Tensor]:
    means = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    prior = GaussianMixture(means, 0.05 * torch.eye(12), scale=0.25, shift=0.5).float()
    return prior, (12,), prior.to_data(prior.sample(32)).float()


def natural() -> tuple[Prior, tuple[int | None, ...], Tensor]:
    prior = ig.load_prior("natural-tiny")
    return prior, prior.shape, known_images(prior.shape)[:2, :, 16:48, 16:48]


SIGNALS = {make.__name__: make for make in (field, mixture, natural)}
FAMILIES: list[tuple[str, str, dict[str, Any]]] = [
    ("eps", "linear-vp", {}),
    ("v", "linear-vp", {}),
    ("x0", "linear-vp", {}),
    ("score", "linear-vp", {}),
    ("flow", "flow", {}),
    ("edm", "edm", {}),
    ("eps", "cosine-vp", {}),
    ("v", "scaled-linear-vp", {}),
    ("score", "ve", {}),
    ("x0", "ve", {}),
    ("flow", "flow", {"time_scale": 1000.0, "reverse_time": True}),
    ("eps", "linear-vp", {"reverse_time": True}),
]
RANGES = ((-1.0, 1.0), (0.0, 1.0))


@pytest.mark.slow
@pytest.mark.parametrize("data_range", RANGES)
@pytest.mark.parametrize(
    ("signals", "predicts", "schedule", "more"),
    [("field", *family) for family in FAMILIES] + [("mixture", *f) for f in FAMILIES[:5]],
)
def test_the_right_convention_is_named(
    signals: str,
    predicts: str,
    schedule: str,
    more: dict[str, Any],
    data_range: tuple[float, float],
):
    truth = Convention(predicts, schedule, data_range, **more)
    prior, shape, images = SIGNALS[signals]()
    told = "x0" if (predicts, schedule) == ("eps", "linear-vp") else "eps"
    report = examine(from_network(Network(prior, truth), told, "linear-vp", shape), images)
    assert report.best == truth, report
    assert not report.equivalent
    assert report.wrong
    assert not report.fits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("predicts", "schedule", "data_range"),
    [
        ("eps", "linear-vp", RANGES[0]),
        ("v", "linear-vp", RANGES[1]),
        ("x0", "linear-vp", RANGES[0]),
        ("score", "ve", RANGES[1]),
        ("flow", "flow", RANGES[0]),
    ],
)
def test_the_right_convention_of_a_trained_network_is_named(
    predicts: str, schedule: str, data_range: tuple[float, float]
):
    truth = Convention(predicts, schedule, data_range)
    prior, shape, images = natural()
    told = "x0" if predicts == "eps" else "eps"
    report = examine(from_network(Network(prior, truth), told, "linear-vp", shape), images)
    assert report.best == truth, report
    assert report.overall(truth) < 0.8  # a trained network beats linear filters on photographs


EPS = {"predicts": "eps", "schedule": "linear-vp"}
FAULTS: dict[str, tuple[Convention, dict[str, Any], str]] = {
    "v told as eps": (Convention("v", "linear-vp", (-1, 1)), EPS, "Pass predicts='v'"),
    "x0 told as eps": (Convention("x0", "linear-vp", (-1, 1)), EPS, "Pass predicts='x0'"),
    "score told as eps": (Convention("score", "linear-vp", (-1, 1)), EPS, "Pass predicts='score'"),
    "eps told as v": (
        Convention("eps", "linear-vp", (-1, 1)),
        EPS | {"predicts": "v"},
        "Pass predicts='eps'",
    ),
    "eps told as x0": (
        Convention("eps", "linear-vp", (-1, 1)),
        EPS | {"predicts": "x0"},
        "Pass predicts='eps'",
    ),
    "velocity told as eps": (
        Convention("flow", "flow", (-1, 1)),
        EPS,
        "Pass predicts='flow', schedule='flow'",
    ),
    "[0, 1] network fed [-1, 1]": (
        Convention("eps", "linear-vp", (0, 1)),
        EPS,
        r"Pass data_range=\(0, 1\)",
    ),
    "[-1, 1] network fed [0, 1]": (
        Convention("eps", "linear-vp", (-1, 1)),
        EPS | {"data_range": (0, 1)},
        r"Pass data_range=\(-1, 1\)",
    ),
    "standardised network fed [-1, 1]": (
        Convention("v", "linear-vp", (-2, 2)),
        EPS | {"predicts": "v"},
        r"Pass data_range=\(-2, 2\), unless these signals have another contrast .*",
    ),
    "cosine told as linear": (
        Convention("eps", "cosine-vp", (-1, 1)),
        EPS,
        "Pass schedule='cosine-vp'",
    ),
    "linear told as cosine": (
        Convention("eps", "linear-vp", (-1, 1)),
        EPS | {"schedule": "cosine-vp"},
        "Pass schedule='linear-vp'",
    ),
    "scaled linear told as linear": (
        Convention("v", "scaled-linear-vp", (-1, 1)),
        EPS | {"predicts": "v"},
        "Pass schedule='scaled-linear-vp'",
    ),
    "steps counted down": (
        Convention("eps", "linear-vp", (-1, 1), reverse_time=True),
        EPS,
        "Pass reverse_time=True",
    ),
    "steps told to be counted down": (
        Convention("eps", "linear-vp", (-1, 1)),
        EPS | {"reverse_time": True},
        "Pass reverse_time=False",
    ),
    "flow from noise to data": (
        Convention("flow", "flow", (-1, 1), reverse_time=True),
        {"predicts": "flow", "schedule": "flow"},
        "Pass reverse_time=True",
    ),
    "flow time up to 1000": (
        Convention("flow", "flow", (-1, 1), 1000.0),
        {"predicts": "flow", "schedule": "flow"},
        "Pass time_scale=1000",
    ),
    "raw EDM network told as denoiser": (
        Convention("edm", "edm", (-1, 1)),
        {"predicts": "x0", "schedule": "ve"},
        "Pass predicts='edm', schedule='edm'",
    ),
    "denoiser told as raw EDM network": (
        Convention("x0", "ve", (-1, 1)),
        {"predicts": "edm", "schedule": "edm"},
        "Pass predicts='x0', schedule='ve'",
    ),
    "two faults": (
        Convention("v", "cosine-vp", (0, 1)),
        EPS,
        r"Pass predicts='v', schedule='cosine-vp', data_range=\(0, 1\)",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_load_prior_refuses_a_bad_fit_and_names_the_right_one(fault: str):
    truth, told, message = FAULTS[fault]
    prior, shape, images = field()
    with pytest.raises(InputError, match=rf"trained otherwise: wrong: .* {message}\. If"):
        ig.load_prior(Network(prior, truth), **told, shape=shape, check=images)


def test_of_a_slow_network_only_the_meaning_of_its_output_is_asked(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("invguide.priors.doctor.examine.QUICK", 0.0)
    prior, shape, images = field()
    calls = []

    def count(truth: Convention, told: dict[str, Any]) -> Module:
        net = Network(prior, truth)
        return Module(lambda x, t: calls.append(len(x)) or net(x, t))

    truth, told, message = FAULTS["v told as eps"]
    with pytest.raises(InputError, match=rf"trained otherwise: wrong: .* {message}\. If"):
        ig.load_prior(count(truth, told), **told, shape=shape, check=images)
    assert calls == [1] * (2 + 6)  # two for the time that it takes, one a level, one picture each
    truth, told, _ = FAULTS["cosine told as linear"]
    with pytest.warns(UserWarning, match=r"more is told by prior\.check\(\)"):
        ig.load_prior(count(truth, told), **told, shape=shape, check=images)


@pytest.mark.slow
@pytest.mark.parametrize("fault", list(FAULTS)[::3])
def test_load_prior_takes_a_good_fit(fault: str):
    truth = FAULTS[fault][0]
    prior, shape, images = field()
    told = {k: v for k, v in vars(truth).items() if k != "qkv_order"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = ig.load_prior(Network(prior, truth), **told, shape=shape, check=images)
    assert isinstance(loaded, NetworkPrior)
    report = loaded.check(images)
    assert report.fits
    # On signals from its own prior an exact denoiser is the best linear filter, up to the few signals' own spectrum.
    assert report.overall(truth) == pytest.approx(1, abs=0.1)
    assert "right: predicts=" in report.verdict


@pytest.mark.slow
def test_a_photograph_is_enough_for_a_network_of_pictures(monkeypatch: pytest.MonkeyPatch):
    prior, _, _ = natural()
    monkeypatch.setattr(pictures, "FREE_SIZE", 32)
    net = Network(prior, Convention("eps", "cosine-vp", (-1.0, 1.0)))
    with pytest.raises(InputError, match=r"Pass predicts='eps'\. If that cannot be, pass check=F"):
        ig.load_prior(net, predicts="v", schedule="cosine-vp")
    ig.load_prior(net, predicts="v", schedule="cosine-vp", check=False)


@pytest.mark.slow
def test_a_photograph_alone_does_not_decide_between_similar_data_ranges(
    monkeypatch: pytest.MonkeyPatch,
):
    """A network of [-1, 1] fed [0, 1] sees pictures of half the contrast, which there are."""
    prior, shape, images = natural()
    monkeypatch.setattr(pictures, "FREE_SIZE", 32)
    net = Network(prior, Convention("x0", "ve", (-1.0, 1.0)))
    told = {"predicts": "x0", "schedule": "ve", "data_range": (0, 1), "shape": shape}
    with pytest.warns(UserWarning, match=r"Pass data_range=\(-1, 1\), unless these signals"):
        ig.load_prior(net, **told)
    with pytest.raises(InputError, match=r"Pass data_range=\(-1, 1\), unless these signals"):
        ig.load_prior(net, **told, check=images)
    # Pictures of half the contrast really do look so.
    pale = (images - images.mean()) / 2 + images.mean()
    report = from_network(net, "x0", "ve", shape).check(pale)
    assert report.wrong
    assert report.doubtful
    # The other way round is no matter of contrast: values below 0 are none that the network knows.
    net = Network(prior, Convention("x0", "ve", (0.0, 1.0)))
    with pytest.raises(InputError, match=r"Pass data_range=\(0, 1\)\. If"):
        ig.load_prior(net, **told | {"data_range": (-1, 1)})


class WithAttention(nn.Module):
    """An exact network, plus attention minus the same attention in the order that it was trained in."""

    def __init__(self, net: nn.Module, trained: Any, told: Any) -> None:
        super().__init__()
        self.net, self.lift = net, nn.Conv2d(1, 32, 1)
        self.layer, reference = Attention(32, 4, told), Attention(32, 4, trained)
        reference.load_state_dict(self.layer.state_dict())
        self.reference = [reference]  # in a list: not a module, so out of the doctor's sight

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.lift(x)
        return self.net(x, t) + 10 * (self.layer(h) - self.reference[0](h)).mean(1, keepdim=True)


@pytest.mark.slow
@pytest.mark.parametrize(("trained", "told"), [("legacy", "new"), ("new", "legacy")])
def test_the_order_of_queries_keys_and_values_is_found(trained: str, told: str):
    prior, shape, images = field()
    images = images[:2]
    truth = Convention("eps", "linear-vp", (-1.0, 1.0), qkv_order=trained)
    net = WithAttention(Network(prior, truth), trained, told)
    wrong = from_network(net, **EPS, shape=shape)
    report = wrong.check(images)
    assert report.best == truth
    assert report.wrong
    assert f"Pass qkv_order='{trained}'" in report.verdict
    assert net.layer.qkv_order == told  # left as it was
    right = from_network(WithAttention(net.net, trained, trained), **EPS, shape=shape)
    assert right.check(images).fits


# ---- what cannot be told, and what is no use


def test_conventions_that_agree_are_said_to():
    """Where there is little noise, eps and v differ by sigma^2 of the image: a thousandth of the error."""
    prior, shape, images = field()
    truth = Convention("eps", "linear-vp", (-1.0, 1.0))
    report = from_network(Network(prior, truth), **EPS, shape=shape, sigma_max=0.05).check(images)
    assert report.fits
    assert report.best == truth
    assert Convention("v", "linear-vp", (-1.0, 1.0)) in report.equivalent
    assert f"and {len(report.equivalent) - 3} more" in report.verdict


def test_an_untrained_network_is_not_refused_but_warned_of():
    """Which convention an untrained network has cannot be known: every one is as bad."""
    torch.manual_seed(1)
    conv = nn.Conv2d(1, 1, 3, padding=1)

    class Untrained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.conv(x)

    _, shape, images = field()
    with pytest.warns(UserWarning, match="denoises these signals under no convention"):
        prior = ig.load_prior(Untrained(), **EPS, shape=shape, check=images)
    assert not prior.check(images).fits  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.slow
def test_zero_weights_are_not_taken_for_a_trained_network():
    """With v or EDM output, zero is shrinkage; on pictures any linear filter beats it."""
    prior, shape, images = natural()
    report = from_network(lambda x, t: torch.zeros_like(x), "v", "linear-vp", shape).check(images)
    assert not report.trained
    flipped = Network(prior, Convention("eps", "linear-vp", (-1.0, 1.0)))
    report = from_network(lambda x, t: -flipped(x, t), **EPS, shape=shape).check(images)
    assert not report.fits  # the sign of the output is no convention of any family


def test_a_network_that_refuses_a_time_has_another_convention():
    prior, shape, images = field()
    net = Network(prior, Convention("eps", "linear-vp", (-1.0, 1.0)))

    def strict(x: Tensor, t: Tensor) -> Tensor:
        if bool((t < 1).any()):
            raise IndexError("no such step")
        return net(x, t)

    assert from_network(strict, **EPS, shape=shape).check(images).fits
    with pytest.raises(IndexError):
        from_network(strict, "eps", "ve", shape, sigma_max=0.9).check(images)
    with pytest.warns(UserWarning, match=r"could not be checked \(no such step\)"):
        ig.load_prior(Module(strict), predicts="eps", schedule="ve", shape=shape, check=images)


@pytest.mark.slow
def test_a_class_conditional_network_is_asked_for_its_first_class():
    prior, shape, images = field()
    net = Network(prior, Convention("v", "linear-vp", (-1.0, 1.0)))
    seen: list[Tensor] = []

    def labelled(x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        seen.append(class_labels)
        return net(x, t)

    wrapped = WithLabels(Module(labelled), classes=7)
    with pytest.raises(InputError, match=r"Pass predicts='v'\. If"):
        ig.load_prior(wrapped, **EPS, shape=shape, check=images)
    assert not any(label.any() for label in seen)
    told = from_network(wrapped, "v", "linear-vp", shape)
    assert told.check(images, label=torch.full((16,), 3)).fits  # pyright: ignore[reportAttributeAccessIssue]
    assert bool((seen[-1] == 3).all())


class Module(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        return self.function(x, t, **condition)


def test_what_is_no_network_or_no_picture():
    with pytest.raises(InputError, match="GaussianField has no network"):
        field()[0].check()
    vector = from_network(lambda x, t: x, "x0", "ve", (12,))
    with pytest.raises(InputError, match=r"shape \(12,\), not grey or colour pictures"):
        vector.check()
    with pytest.raises(ShapeError, match=r"images must be \(N, 12\), in data units; got \(2, 3\)"):
        vector.check(torch.zeros(2, 3))
    with pytest.raises(InputError, match="all of one value"):
        vector.check(torch.zeros(2, 12))


# ---- the reference and the pictures


@pytest.mark.parametrize("sigma", [0.02, 0.2, 2.0])
def test_the_linear_filter_is_wieners(sigma: float):
    """On white noise it shrinks; on a field it has the error of that field's exact denoiser."""
    white = 0.3 * torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = 0.09 * sigma**2 / (0.09 + sigma**2)
    assert linear_error(white, sigma) == pytest.approx(expected, rel=0.02)  # 16384 numbers
    vectors = white.flatten(1)
    assert linear_error(vectors, sigma) == pytest.approx(expected, rel=0.02)
    prior = GaussianField((1, 16, 16))
    spectrum = prior.spectrum
    exact = float((spectrum * sigma**2 / (spectrum + sigma**2)).mean())
    # Rings of one width hold frequencies of slightly unequal power.
    assert linear_error(prior.sample(256), sigma) == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("shape", [(3, None, None), (1, 16, 24), (3, 192, 100), (1, 500, 300)])
def test_known_images_fit(shape: tuple[int | None, ...]):
    images = known_images(shape)
    assert len(images) in (2, 4)
    assert images.shape[1:] == tuple(size or pictures.FREE_SIZE for size in shape)
    assert 0 <= float(images.min()) < float(images.max()) <= 1
    assert float(images.flatten(1).std(1).min()) > 0.02  # no part is blank


# ---- the command


@pytest.mark.slow
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pictures, "FREE_SIZE", 32)
    result = CliRunner().invoke(app, ["doctor", "natural-tiny"])
    assert result.exit_code == 0, result.output
    assert "right: predicts='edm', schedule='edm', data_range=(-1, 1)" in result.output
    result = CliRunner().invoke(app, ["doctor", str(tmp_path / "none.pt")])
    assert result.exit_code == 2
