"""A grey prior made of a colour one: against the posterior mean of colour pictures that are known to be grey."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import invguide as ig
from invguide.errors import InputError, ShapeError
from invguide.numerics.linear import per_sample
from invguide.operators import Identity
from invguide.prior import Prior
from invguide.priors import Grey, Padded, Tiled
from tiny import run

PHOTO = Path(__file__).parents[2] / "invguide" / "data" / "chelsea.png"


class Colour(Prior):
    """Pixels are independent normals around a mean picture, their channels correlated: D by the textbook formula."""

    shape: tuple[int | None, ...] = (3, None, None)
    sigma_min, sigma_max, scale, shift, symmetric = 0.02, 40.0, 0.5, 0.25, True

    def __init__(self) -> None:
        super().__init__()
        # Brightness and colour are independent, as for every law that treats the channels alike.
        self.covariance = 0.3 * torch.eye(3, dtype=torch.float64) + 0.9
        self.told: list[float] = []

    def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
        level = torch.as_tensor(sigma, dtype=x.dtype).expand(len(x))
        self.told += level.tolist()
        noise = level.reshape(-1, 1, 1) ** 2 * torch.eye(3, dtype=x.dtype)
        gain = self.covariance.to(x) @ torch.linalg.inv(self.covariance.to(x) + noise)
        return torch.einsum("bij,bjhw->bihw", gain, x - 0.1) + 0.1


def test_it_is_the_posterior_mean_of_grey_pictures() -> None:
    """y = x + s n in one channel, x ~ N(0.1, v), v the variance of the brightness (1, 1, 1) / 3: closed form."""
    inner = Colour()
    prior = Grey(inner)
    x = torch.randn(2, 1, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.3, 1.5], dtype=torch.float64)
    variance = float(inner.covariance.sum()) / 9
    gain = per_sample(variance / (variance + sigma**2), x)
    assert torch.allclose(prior.denoise(x, sigma), 0.1 + gain * (x - 0.1), atol=1e-12)
    assert inner.told == pytest.approx((3**0.5 * sigma).tolist())


def test_levels_and_units_are_those_inside() -> None:
    prior = Grey(Colour())
    assert prior.shape == prior.sample_shape == (1, None, None)
    assert (prior.sigma_min, prior.sigma_max) == pytest.approx((0.02 / 3**0.5, 40 / 3**0.5))
    assert (prior.scale, prior.shift, prior.symmetric) == (0.5, 0.25, True)
    prior.denoise(torch.zeros(1, 1, 4, 4), prior.sigma_max)
    assert prior.prior.told == pytest.approx([40.0])
    with pytest.raises(
        ShapeError, match=r"takes x of shape \(B, 1, any, any\), got \(1, 3, 4, 4\)"
    ):
        prior.denoise(torch.zeros(1, 3, 4, 4), 1.0)


def test_tiles_and_gradients() -> None:
    inner = ig.load_prior("natural-tiny")
    x = torch.rand(1, 1, 40, 48, generator=torch.Generator().manual_seed(0)) - 0.5
    whole, tiles = Grey(inner), Grey(Tiled(inner, 32, 16))
    assert float((whole.denoise(x, 0.2) - tiles.denoise(x, 0.2)).abs().max()) < 0.1
    x.requires_grad_()
    (slope,) = torch.autograd.grad(whole.denoise(x, 0.2).sum(), x)
    step = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        up, down = (whole.denoise(x + h * step, 0.2).sum() for h in (1e-2, -1e-2))
    assert float((slope * step).sum()) == pytest.approx(float(up - down) / 2e-2, rel=0.02)


def test_what_is_not_colour_is_refused() -> None:
    class Decoded(Colour):
        affine = False

    with pytest.raises(InputError, match=r"Colour takes \(3, None, None\)|colour pictures"):
        Grey(Grey(Colour()))
    with pytest.raises(InputError, match="which it decodes"):
        Grey(Decoded())
    assert Grey(Padded(Colour(), 8)).channels == 3


def test_a_grey_picture_takes_one_call_for_one_answer(tmp_path: Path) -> None:
    """The command line's answer is the network's own, by hand; and solve's, in Python."""
    pixels = np.asarray(Image.open(PHOTO).convert("L").resize((40, 32)), float)
    noise = 25 * np.random.default_rng(0).standard_normal(pixels.shape)
    noisy = np.rint((pixels + noise).clip(0, 255)).astype(np.uint8)
    Image.fromarray(noisy).save(tmp_path / "y.png")
    out = tmp_path / "out"
    run(
        "restore", tmp_path / "y.png", "--task", "denoise", "--sigma-y", 0.1, "--out", out, "--arrays",
        "--prior", "natural-tiny", "--precision", "fp32", "--device", "cpu",
    )  # fmt: skip
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["settings"]["solver"] == "PosteriorMean"
    assert manifest["nfe"] == 1
    inner = ig.load_prior("natural-tiny")
    y = torch.from_numpy(noisy / 255).float()[None, None]
    with torch.no_grad():
        colour = inner.to_normalised(y).expand(1, 3, -1, -1)
        level = torch.tensor(3**0.5 * 0.1 / inner.scale)
        expected = inner.to_data(inner.denoise(colour, level)).mean(1)
    found = torch.from_numpy(np.load(out / "samples.npy"))[0, 0]
    assert torch.allclose(found, expected, atol=1e-4)
    result = ig.solve(y, Identity(), Grey(inner), sigma_y=0.1, device="cpu", progress=False)
    assert torch.allclose(result.samples[0, 0], expected, atol=1e-4)
    assert Image.open(out / "restored.png").mode == "L"
