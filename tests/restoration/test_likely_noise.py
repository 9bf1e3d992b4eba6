"""The likeliest noise level under a prior: closed form for normals, and photographs whose noise is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import invguide as ig
from invguide.diagnostics.metrics import psnr
from invguide.images.noise_level import estimate_noise
from invguide.images.reading import read_picture
from invguide.images.writing import write_picture
from invguide.numerics.linear import per_sample
from invguide.prior import Prior
from invguide.restoration import measure
from invguide.restoration.likely_noise import LEAST, balance, likely_level
from tiny import run

PHOTO = Path(__file__).parents[2] / "invguide" / "data" / "chelsea.png"


class White(Prior):
    """Pixels are independent normals of deviation 0.05 around 0.5, data units."""

    shape: tuple[int | None, ...] = (1, None, None)
    sigma_min, sigma_max, scale, shift = 1e-4, 10.0, 0.05, 0.5

    def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
        return x / (1 + per_sample(sigma, x) ** 2)


@pytest.mark.parametrize("sigma", [0.02, 0.05, 0.1])
def test_balance_is_the_slope_of_the_likelihood(sigma: float) -> None:
    """Of N(0, 1 + s^2) in closed form: s d log p / ds = s^2 / (1 + s^2) (|x|^2 / (1 + s^2) - 1)."""
    prior = White()
    source = torch.Generator().manual_seed(0)
    y = 0.5 + 0.08 * torch.randn(1, 1, 64, 64, generator=source, dtype=torch.float64)
    s = sigma / 0.05
    power = float(prior.to_normalised(y).square().mean())
    expected = s**2 / (1 + s**2) * (power / (1 + s**2) - 1)
    assert balance(prior, y, sigma) == pytest.approx(expected, abs=1e-9)


def test_clipped_pixels_do_not_count() -> None:
    prior = White()
    y = 0.5 + 0.06 * torch.randn(1, 1, 64, 64, dtype=torch.float64)
    barred = torch.cat([torch.zeros(1, 1, 40, 64, dtype=y.dtype), y, torch.ones_like(y)], 2)
    assert balance(prior, barred, 0.04) == pytest.approx(balance(prior, y, 0.04), abs=1e-9)


@pytest.mark.parametrize("true", [0.01, 0.03, 0.1])
def test_levels_too_high_come_down_and_others_stay(true: float) -> None:
    """A photograph: an estimate four times too high ends within a third of the truth; the truth is left alone."""
    prior = ig.load_prior("natural")
    photo = read_picture(PHOTO).values[..., 60:124, 100:164]
    noise = torch.randn(photo.shape, generator=torch.Generator().manual_seed(0))
    y = photo + true * noise
    assert likely_level(prior, y, true) == true
    assert likely_level(prior, y, 0.8 * true) == 0.8 * true
    assert likely_level(prior, y, 4 * true) == pytest.approx(true, rel=0.34)


def test_what_has_no_noise_at_all() -> None:
    """A flat picture: the balance is -s^2 / (1 + s^2), and 0.05 short of even at s = 0.2294; never below the least."""
    flat = torch.full((1, 1, 32, 32), 0.5, dtype=torch.float64)
    prior = White()
    assert likely_level(prior, flat, 0.1) == pytest.approx(0.2294 * prior.scale, rel=0.03)
    prior.scale = 1e-5
    assert likely_level(prior, flat, 0.1) == LEAST


def test_texture_is_not_taken_for_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An estimate ten times too high: without the prior's word the answer would be worse than the picture."""
    photo = read_picture(PHOTO).values[..., 60:156, 100:196]
    noise = torch.randn(photo.shape, generator=torch.Generator().manual_seed(0))
    write_picture(tmp_path / "y.png", photo + 0.004 * noise)
    high = estimate_noise(photo)._replace(
        sigma=0.04, chroma=0.004, compression=0.0, trusted=True, reason=""
    )
    monkeypatch.setattr(measure, "estimate_noise", lambda *a: high)
    out = tmp_path / "out"
    base = ("restore", tmp_path / "y.png", "--task", "denoise", "--precision", "fp32")
    printed = run(*base, "--out", out)
    assert "the estimate 0.04 would take texture for noise" in printed
    told = json.loads((out / "manifest.json").read_text())
    assert told["sigma_y"] == LEAST  # the prior knows no level below 0.005
    assert not told["noise_estimate"]["trusted"]
    given = tmp_path / "given"
    run(*base, "--sigma-y", 0.04, "--out", given)
    noisy, ours, wrong = (
        float(psnr(read_picture(p).values, photo))
        for p in (tmp_path / "y.png", out / "restored.png", given / "restored.png")
    )
    assert wrong < noisy <= ours
    even = high._replace(chroma=0.04)  # of colours as of brightness: noise, be it white or not
    monkeypatch.setattr(measure, "estimate_noise", lambda *a: even)
    assert "sigma_y   0.04 (estimated)" in run(*base, "--out", tmp_path / "even")
