"""Every public prior keeps the promises of `invguide.testing.check_prior`: one table, and planted mistakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import invguide as ig
from invguide.errors import ContractError, InputError
from invguide.numerics.linear import per_sample
from invguide.prior import Prior
from invguide.priors import (
    Gaussian,
    GaussianField,
    GaussianMixture,
    Grey,
    LatentPrior,
    Padded,
    Tiled,
)
from invguide.testing import check_prior

SHAPE = (1, 8, 8)


class White(Prior):
    """Standard normals; with `gain` (B,), that many times as wide."""

    shape: tuple[int | None, ...] = (1, None, None)
    sigma_min, sigma_max, sigma_data = 0.01, 50.0, 1.0

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64

    def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
        gain = per_sample(condition.get("gain", x.new_ones(())), x)
        return x / (1 + (per_sample(sigma, x) / gain) ** 2)


def coloured() -> Gaussian:
    """Pictures (3, 4, 4) that are nearly grey."""
    colours = 0.98 * torch.ones(3, 3) + 0.02 * torch.eye(3)
    i = torch.arange(16.0)
    smooth = torch.exp(-(((i[:, None] - i) / 4) ** 2)) + 0.1 * torch.eye(16)
    covariance = torch.kron(colours, smooth / 1.1).double()
    return Gaussian(torch.zeros(3, 4, 4), covariance, scale=0.2, shift=0.5)


class Shuffle(nn.Module):
    """An autoencoder that loses nothing: four pixels per latent."""

    def __init__(self) -> None:
        super().__init__()
        self.unit = nn.Parameter(torch.ones((), dtype=torch.float64))

    def decode(self, z: Tensor) -> Tensor:
        return nn.functional.pixel_shuffle(self.unit * z, 2)

    def encode(self, x: Tensor) -> Tensor:
        return nn.functional.pixel_unshuffle(x, 2)


def latent() -> LatentPrior:
    inner = Gaussian(torch.zeros(4, 1, 2), 0.1 * torch.eye(8) + 0.02 * torch.ones(8, 8))
    return LatentPrior(inner, Shuffle(), scaling_factor=1, factor=2, channels=1)


def mixture() -> GaussianMixture:
    return GaussianMixture([[-1.0, 0.0], [1.0, 1.0]], 0.1 * torch.eye(2).double())


class Row(NamedTuple):
    prior: Callable[[], Prior]
    shape: tuple[int, ...] | None = None
    condition: dict[str, Tensor] = {}
    exceptions: dict[str, str] = {}


PLANE = ([0.5, -0.3], [[1.0, 0.6], [0.6, 0.5]])
TABLE = {
    "Gaussian": Row(lambda: Gaussian(*PLANE)),
    "Gaussian-float32": Row(lambda: Gaussian(*PLANE, scale=0.2, shift=0.5).float()),
    "GaussianField": Row(lambda: GaussianField(SHAPE, std=0.5, mean=0.2, scale=0.2, shift=0.5)),
    "GaussianMixture": Row(mixture),
    "GaussianMixture-label": Row(mixture, condition={"label": torch.tensor([0, 1])}),
    "Grey": Row(lambda: Grey(coloured())),
    "LatentPrior": Row(latent),
    "NetworkPrior": Row(lambda: ig.load_prior("natural-tiny"), (3, 32, 32)),
    "Padded": Row(lambda: Padded(White(), 8), (1, 9, 12)),
    "Tiled": Row(lambda: Tiled(White(), 16, 8), (1, 24, 28)),
    "Tiled-gain": Row(
        lambda: Tiled(White(), 16, 8), (1, 24, 28), {"gain": torch.tensor([1.0, 2.0])}
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_prior_keeps_its_promises(name: str):
    row = TABLE[name]
    check_prior(row.prior(), row.shape, condition=row.condition, exceptions=row.exceptions)


def test_every_public_prior_is_in_the_table():
    public = {name: getattr(ig.priors, name) for name in ig.priors.__all__}
    kinds = {n for n, kind in public.items() if isinstance(kind, type) and issubclass(kind, Prior)}
    assert {name.partition("-")[0] for name in TABLE} == kinds


# ---- planted mistakes, in White


def in_place(self: White, x: Tensor, sigma: Any, **condition: Tensor) -> Tensor:
    clean = White.denoise(self, x, sigma)
    with torch.no_grad():
        x.mul_(1.001)
    return clean


def then(change: Callable[[Tensor, Tensor, Tensor], Tensor]) -> dict[str, Any]:
    """D changed, given x and sigma as (B, 1, ...)."""

    def denoise(self: White, x: Tensor, sigma: Any, **condition: Tensor) -> Tensor:
        return change(White.denoise(self, x, sigma, **condition), x, per_sample(sigma, x))

    return {"denoise": denoise}


def first_level(self: White, x: Tensor, sigma: Any, **condition: Tensor) -> Tensor:
    return White.denoise(self, x, torch.as_tensor(sigma).flatten()[0], **condition)


def first_condition(self: White, x: Tensor, sigma: Any, gain: Tensor) -> Tensor:
    return White.denoise(self, x, sigma, gain=gain[:1].expand(len(x)) * (1 + 0.1 * gain))


def no_condition(self: White, x: Tensor, sigma: Any, **condition: Tensor) -> Tensor:
    return White.denoise(self, x, sigma)


def other_gain(self: White, x: Tensor, sigma: Any, gain: Tensor) -> Tensor:
    """That of the row below."""
    return White.denoise(self, x, sigma, gain=gain.roll(1))


def draws(spread: float, fixed: bool = False) -> Callable[..., Tensor]:
    def sample(self: White, n: int, seed: int = 0) -> Tensor:
        source = torch.Generator().manual_seed(0 if fixed else seed)
        return spread * torch.randn(n, *SHAPE, generator=source, dtype=torch.float64)

    return sample


GAIN = {"gain": torch.tensor([1.0, 3.0])}
MISTAKES: list[tuple[str, str, dict[str, Any], dict[str, Tensor]]] = [
    ("range", "sigma_min is 60", {"sigma_min": 60.0, "sample": draws(1.0)}, {}),
    ("sigma_data", "sigma_data is 3", {"sigma_data": 3.0}, {}),
    ("answers", "changes x", {"denoise": in_place}, {}),
    ("answers", "torch.float32", then(lambda d, x, s: d.float()), {}),
    ("answers", "call to call", then(lambda d, x, s: d + 1e-9 * torch.rand_like(d)), {}),
    ("answers", "returned NaN", then(lambda d, x, s: d * (s < 49).where(s < 49, torch.nan)), {}),
    ("rows independent", "off its rows", then(lambda d, x, s: d + 1e-6 * x.mean()), {}),
    ("rows independent", "off its rows", {"denoise": first_level}, {}),
    ("rows independent", "off its rows", {"denoise": other_gain}, GAIN),
    ("conditions", "same answer", {"denoise": no_condition}, GAIN),
    ("rows independent", "off its rows", {"denoise": first_condition}, GAIN),
    ("lowest level", "moves x", then(lambda d, x, s: 0.9 * d), {}),
    ("answers", "not finite at sigma 50", {**then(lambda d, x, s: d / (s < 49)), "sample": draws(1.0)}, {}),
    ("highest level", "answers spread", then(lambda d, x, s: x / (1 + s)), {}),
    ("highest level", "the mean answer", {**then(lambda d, x, s: d + s / (1 + s)), "sample": draws(1.0)}, {}),
    ("gradient", "does not reach", then(lambda d, x, s: d.detach()), {}),
    ("gradient", "central", then(lambda d, x, s: d.detach() + 0.5 * (x - x.detach())), {}),
    ("score and eps", "score is", {"score": lambda self, x, s: (x - self.denoise(x, s)) / s**2}, {}),
    ("score and eps", "eps is", {"eps": lambda self, x, s: x - self.denoise(x, s)}, {}),
    ("units", "scale", {"to_data": lambda self, x: 2 * x, "sample": draws(1.0)}, {}),
    ("units", "to_normalised", {"shift": 0.5, "to_normalised": lambda self, x: x, "sample": draws(1.0)}, {}),
    ("units", "normalised_shape", {"normalised_shape": lambda self, shape: (3, 8, 8), "sample": draws(1.0)}, {}),
    ("wrong shapes", "is denoised as", then(lambda d, x, s: d[None] if d.ndim == 3 else d), {}),
    ("sample", "times the spread", {"sample": draws(1.15), "sigma_data": None}, {}),
    ("sample", "another seed", {"sample": draws(1.0, fixed=True)}, {}),
]  # fmt: skip


def planted(**body: Any) -> Prior:
    return type("Planted", (White,), body)()


def test_without_a_mistake_nothing_is_said():
    check_prior(planted(sample=draws(1.0)), SHAPE)
    check_prior(planted(), SHAPE, condition=GAIN)


@pytest.mark.slow
@pytest.mark.parametrize(("promise", "text", "body", "condition"), MISTAKES)
def test_planted_mistakes_are_named(
    promise: str, text: str, body: dict[str, Any], condition: dict[str, Tensor]
):
    with pytest.raises(ContractError, match=text) as caught:
        check_prior(planted(**body), SHAPE, condition=condition)
    assert caught.value.promise == promise, caught.value
    assert str(caught.value).startswith("Planted breaks the promise")


def test_exceptions_and_arguments():
    with pytest.raises(ContractError, match="keeps the promise 'units'"):
        check_prior(White(), SHAPE, exceptions={"units": "none"})
    with pytest.raises(InputError, match="leaves sizes open"):
        check_prior(White())
