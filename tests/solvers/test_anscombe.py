"""Counts denoised in one call: the transform against the law itself, the solver against the network by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image
from torch import Tensor

import invguide as ig
from invguide import bench, driver
from invguide.bench import photon_counts
from invguide.errors import CompatibilityError, InputError
from invguide.forward_operator import LinearOperator
from invguide.likelihood import Likelihood
from invguide.noise import Poisson, PoissonGaussian
from invguide.numerics.linear import per_sample
from invguide.operators import GaussianBlur, Identity
from invguide.policy import choose
from invguide.prior import Prior
from invguide.problem.problem import Problem
from invguide.solvers import HQS, Anscombe

SHAPE = (1, 4, 6)
GAIN = 0.05


class White(Prior):
    """Standard normals in normalised units; signals 0.5 + 0.5 of them."""

    shape: tuple[int | None, ...] = (1, None, None)
    sigma_min, sigma_max, sigma_data, symmetric = 0.01, 50.0, 1.0, True
    scale, shift = 0.5, 0.5

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64

    def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
        return x / (1 + per_sample(sigma, x) ** 2)


class Flip(LinearOperator):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(-1)

    def adjoint(self, y: Tensor) -> Tensor:
        return y.flip(-1)


class Times(LinearOperator):
    def __init__(self, unit: float) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, x: Tensor) -> Tensor:
        return self.unit * x

    def adjoint(self, y: Tensor) -> Tensor:
        return self.unit * y


def counts(unit: float = 1.0) -> Tensor:
    source = np.random.default_rng(0)
    return unit * GAIN * torch.from_numpy(source.poisson(10.0, (2, *SHAPE)).astype(float))


def solved(y: Tensor, operator: object, law: object, solver: Anscombe | None = None) -> Tensor:
    likelihood = Likelihood(ig.as_operator(operator), y, law)  # pyright: ignore[reportArgumentType]
    problem = Problem(White(), likelihood, shape=SHAPE)
    return driver.run(solver or Anscombe(), problem, progress=False).samples[:, 0]


# ---- the transform


@pytest.mark.parametrize("reading", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("rate", [0.3, 1.0, 4.0, 30.0])
def test_the_inverse_leads_from_the_mean_back_to_the_rate(rate: float, reading: float) -> None:
    """By sums over the law itself; Makitalo and Foi give their closed form to about 0.01 counts, 0.04 with reading."""
    law = Poisson(GAIN) if not reading else PoissonGaussian(GAIN, reading * GAIN)
    law = law.bind(torch.zeros(1, 1, dtype=torch.float64))
    k = np.arange(200)
    nodes, weights = np.polynomial.hermite_e.hermegauss(101)
    y = torch.from_numpy(GAIN * (k[:, None] + reading * nodes))
    chance = scipy.stats.poisson.pmf(k, rate)[:, None] * (weights / weights.sum())
    z = law.stabilise(y).numpy()
    mean = (chance * z).sum()
    spread = ((chance * z**2).sum() - mean**2) ** 0.5
    back = float(law.unstabilise(torch.tensor([[mean]]))) / GAIN
    assert back == pytest.approx(rate, abs=0.015 if not reading else 0.06, rel=2e-3)
    if rate >= 4:  # what the transform is for
        assert spread == pytest.approx(1.0, abs=0.05)
    plain = (
        (mean / 2) ** 2 - 0.375 - reading**2
    )  # the algebraic inverse, biased by a quarter of a count
    assert abs(back - rate) < abs(plain - rate)


# ---- the solver


@pytest.mark.parametrize("reading", [0.0, 0.3])
def test_the_solver_is_the_network_between_the_transform_and_its_inverse(reading: float) -> None:
    y = counts()
    law = PoissonGaussian(GAIN, reading * GAIN) if reading else Poisson(GAIN)
    x = solved(y, Identity(), law)

    def f(counted: np.ndarray | float) -> np.ndarray:
        return 2 * np.sqrt(np.asarray(counted) + 0.375 + reading**2)

    half = (f(1 / GAIN) - f(0.0)) / 2
    z = (f(y.numpy() / GAIN) - f(0.0)) / half - 1
    z = z / (1 + 1 / half**2)
    z = (z + 1) * half + f(0.0)
    k = z**2 / 4 + 1.5**0.5 / 4 / z - 11 / 8 / z**2 + 5 / 8 * 1.5**0.5 / z**3 - 1 / 8 - reading**2
    assert np.abs(x.numpy() - GAIN * np.clip(k, 0, None)).max() < 1e-12


@pytest.mark.parametrize("unit", [1e-9, 3.0, 1e9])
def test_units_and_the_gain_of_the_operator_do_not_matter(unit: float) -> None:
    here = solved(counts(), Identity(), Poisson(GAIN))
    there = solved(counts(unit), Times(unit), Poisson(unit * GAIN))
    assert torch.allclose(here, there, rtol=1e-10)


def test_views_are_turned_back() -> None:
    """A denoiser that blurs to one side only, over eight views, is the mean of what it does to each."""

    class OneSided(White):
        def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
            return (x + x.roll(1, -1)) / 2

    y = counts()[..., :4]  # square: quarter turns keep its shape
    problem = Problem(OneSided(), Likelihood(Identity(), y, Poisson(GAIN)), shape=(1, 4, 4))
    stretch = problem.counts
    assert stretch is not None
    x = driver.run(Anscombe(num_steps=8), problem, progress=False).samples[:, 0]
    z = stretch.stabilise(y)
    sides = [z.roll(shift, axis) for shift in (1, -1) for axis in (-1, -2)]
    expected = stretch.unstabilise((z + sum(sides) / 4) / 2)
    assert torch.allclose(x, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("operator", "law"),
    [
        (GaussianBlur(sigma=1.0), Poisson(GAIN)),
        (Flip(), Poisson(GAIN)),  # orthonormal, but other pixels
        (lambda x: x**2, Poisson(GAIN)),
        (Identity(), 0.1),
        (Identity(), Poisson(GAIN * torch.linspace(1, 2, 24).reshape(SHAPE))),
        (Identity(), Poisson(1e4)),  # next to no photon: above sigma_max
    ],
)
def test_what_is_no_count_of_the_picture_itself_is_refused(operator: object, law: object) -> None:
    likelihood = Likelihood(ig.as_operator(operator), counts(), law)  # pyright: ignore[reportArgumentType]
    problem = Problem(White(), likelihood, shape=SHAPE)
    with pytest.raises(CompatibilityError, match=r"counts of a picture itself|linear operator"):
        driver.run(Anscombe(), problem, progress=False)
    assert not isinstance(choose(problem).solver, Anscombe)


def test_auto_takes_it_for_one_answer() -> None:
    problem = Problem(White(), Likelihood(Identity(), counts(), Poisson(GAIN)))
    assert choose(problem).solver == Anscombe()
    assert not choose(problem, 4).solver.point_estimate


# ---- the bench


class _Half:
    """In place of the package bm3d."""

    told: list[float] = []

    @classmethod
    def bm3d_rgb(cls, z: np.ndarray, sigma: float) -> np.ndarray:
        cls.told.append(sigma)
        return z


def test_photon_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo = Path(__file__).parents[2] / "invguide" / "data" / "chelsea.png"
    pixels = np.asarray(Image.open(photo).convert("RGB"))
    np.savez(tmp_path / "photos.npz", img_32=np.stack([pixels[:32, :32], pixels[-32:, -32:]]))
    monkeypatch.setattr(photon_counts, "find_spec", lambda name: name)
    monkeypatch.setattr(photon_counts, "import_module", lambda name: _Half)
    monkeypatch.setattr(photon_counts.metadata, "version", lambda name: "0")
    settings = {"size": 32, "photos": 2, "prior": "natural-tiny", "progress": False}
    data = tmp_path / "photos.npz"
    table = bench.photons(data, counts=(20.0,), solvers=[HQS(num_steps=2)], **settings)
    assert [row[0] for row in table.rows] == ["y", "Anscombe, CBM3D", "auto: Anscombe", "HQS"]
    gain = 0.45 / 20
    half = 1 / (2 * (np.sqrt(1 / gain + 0.375) - np.sqrt(0.375)))
    assert _Half.told == pytest.approx([half] * 2)
    protocol = photon_counts.Photons(data, 32, 2, counts=20.0)
    assert (
        float(protocol.truth[:, :, 0, 0].abs().max()) == 0.0
    )  # a black ground, and no count on it
    assert float(protocol.likelihood("denoise", 0).y[:, :, 0, 0].abs().max()) == 0.0
    counted = protocol.likelihood("denoise", 1).y / gain
    assert torch.allclose(counted, counted.round(), atol=1e-4)
    chi2 = protocol.likelihood("denoise", 1).chi2(protocol.truth[1, None])
    assert float(chi2) == pytest.approx(1.0, abs=3 * (2 / counted.numel()) ** 0.5 + 0.05)
    with pytest.raises(InputError, match="mean numbers of photons"):
        bench.photons(data, counts=(0.0,), **settings)
