"""The estimate of noise: against exact moments, bounds of its statistics, and noise that was put in."""

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import norm, truncnorm

from invguide.errors import InputError
from invguide.images.jpeg_grid import find_grid, find_steps, luma, rounded, step_of
from invguide.images.noise_blocks import clipped_variance, cut, spectra
from invguide.images.noise_level import NoiseLevel, estimate_noise, estimate_sigma
from invguide.images.reading import read_picture
from invguide.images.smooth_blocks import Component, bisect, solve_level


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    """A clean photograph; scaled, so that noise is not clipped."""
    path = Path(__file__).parents[2] / "invguide" / "data" / "chelsea.png"
    return read_picture(path).values * 0.6 + 0.2


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def eight_bits(y: torch.Tensor) -> torch.Tensor:
    return (y.clamp(0, 1) * 255).round() / 255


def as_jpeg(y: torch.Tensor, quality: int, subsampling: int) -> torch.Tensor:
    pixels = (eight_bits(y) * 255).byte()[0].permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=subsampling)
    with Image.open(file) as image:
        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 255


# ---- closed forms


@pytest.mark.parametrize("ends", [(0.0, 1.0), (0.0, np.inf), (-np.inf, 1.0)])
@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.3])
def test_variance_of_clipped_noise(ends: tuple[float, float], sigma: float):
    """Against scipy's truncated normal and the two piles at the ends."""
    centres = np.array([-0.05, 0.0, 0.03, 0.2, 0.5, 0.9, 1.0, 1.02])
    low, high = ends
    mean, second = [], []
    for a in centres:
        alpha, beta = (low - a) / sigma, (high - a) / sigma
        inside, below, above = norm.cdf(beta) - norm.cdf(alpha), norm.cdf(alpha), norm.sf(beta)
        m, v = truncnorm.stats(alpha, beta, loc=a, scale=sigma, moments="mv")
        parts = [(inside, m, v + m * m)]
        parts += [(below, low, low * low)] if np.isfinite(low) else []
        parts += [(above, high, high * high)] if np.isfinite(high) else []
        mean.append(sum(share * m for share, m, _ in parts))
        second.append(sum(share * s for share, _, s in parts))
    exact = np.array(second) - np.square(mean)
    found = clipped_variance(np.array(mean), sigma, ends)
    # The table has 4000 nodes over 1 + 12 sigma or less: linear interpolation is off by less than 1e-4 sigma^2.
    np.testing.assert_allclose(found, exact, atol=2e-4 * sigma**2)


def test_level_of_chi_squared_power():
    power = 0.07**2 * np.random.default_rng(0).chisquare(28, 40000)
    found = solve_level(power, 28, lambda s: np.full(40000, s * s), 0.25)
    assert found == pytest.approx(0.07, rel=0.003)
    assert bisect(lambda s: 0.123 - s) == pytest.approx(0.123, rel=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sigma", [0.01, 0.1])
def test_pure_noise_on_a_slope(channels: int, sigma: float):
    ramp = torch.linspace(0.3, 0.7, 256).expand(1, channels, 256, 256)
    level = estimate_noise(ramp + sigma * normals(1, channels, 256, 256), bits=32)
    # A tenth of 12000 overlapping blocks, a fifth of these disjoint: 240 of 28 coefficients, 0.9 % and the quantile's
    # efficiency of about a half; four deviations.
    assert level.sigma == pytest.approx(sigma, rel=0.05)
    assert level.trusted
    assert level.whiteness > 0.9
    assert level.compression == 0
    if channels == 3:
        assert level.luma == pytest.approx(level.chroma, rel=0.06)


@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_scaling_the_picture_scales_the_level(photo: torch.Tensor, factor: float):
    y = photo + 0.05 * normals(*photo.shape)
    found, scaled = estimate_noise(y, bits=32), estimate_noise(factor * y, bits=32)
    assert scaled.sigma == pytest.approx(factor * found.sigma, rel=5e-4)  # of the bisection


# ---- photographs


@pytest.mark.parametrize("sigma", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("size", [48, 192])
def test_noise_of_a_colour_photograph(photo: torch.Tensor, size: int, sigma: float):
    y = photo[..., :size, :size] + sigma * normals(1, 3, size, size)
    assert estimate_sigma(y) == pytest.approx(sigma, rel=0.06 if size == 192 else 0.12)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [0, 55, 128, 192])
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_constant_areas_tell_nothing(photo: torch.Tensor, rows: int, value: float):
    noisy = eight_bits(photo[..., :128, :128] + 0.1 * normals(1, 3, 128, 128))
    full = torch.full((1, 3, 128 + rows, 128), value)
    full[:, :, rows // 2 : rows // 2 + 128] = noisy
    assert estimate_sigma(full) == pytest.approx(0.1, rel=0.06)


@pytest.mark.parametrize("sigma", [0.1, 0.2, 0.3])
def test_clipping_is_undone(photo: torch.Tensor, sigma: float):
    strong = ((photo - 0.5) * 2.5 + 0.5).clamp(0, 1)
    clipped = eight_bits(strong + sigma * normals(*photo.shape))
    assert estimate_sigma(clipped) == pytest.approx(sigma, rel=0.08)


def test_luma_alone_of_a_tinted_picture(photo: torch.Tensor):
    """A grey scan saved with a tint has no noise in colour, and noise all the same."""
    grey = photo.mean(1, keepdim=True) + 0.05 * normals(1, 1, *photo.shape[2:])
    tinted = eight_bits(grey * torch.tensor([1.0, 0.95, 0.85]).reshape(1, 3, 1, 1))
    level = estimate_noise(tinted)
    assert level.sigma == level.luma > 5 * level.chroma
    # Noise common to all channels is 1 / |luma weights| = 1.5 times as large in normalised luma.
    assert level.sigma == pytest.approx(0.05 * 0.96 / 0.6687, rel=0.08)


# ---- pixels that are missing


@pytest.mark.parametrize("share", [0.3, 0.5, 0.95])
def test_holes(photo: torch.Tensor, share: float):
    y = photo + 0.08 * normals(*photo.shape)
    mask = torch.rand((1, *photo.shape[2:]), generator=torch.Generator().manual_seed(1)) < share
    assert estimate_sigma(y * mask, mask) == pytest.approx(0.08, rel=0.12)
    if share < 0.9:  # holes are no noise, and the mask says so; few leave whole blocks
        assert estimate_sigma(y * mask) > 1.5 * 0.08


def test_masks_that_differ_between_channels(photo: torch.Tensor):
    y = photo + 0.08 * normals(*photo.shape)
    mask = torch.zeros(photo.shape[1:])
    for channel, (row, column) in enumerate([(0, 0), (0, 1), (1, 1)]):
        mask[channel, row::2, column::2] = 1
    assert estimate_sigma(y * mask, mask) == pytest.approx(0.08, rel=0.2)


def test_a_large_hole_leaves_whole_blocks(photo: torch.Tensor):
    y = eight_bits(photo + 0.05 * normals(*photo.shape))
    mask = torch.ones(1, *photo.shape[2:])
    mask[:, 40:90, 40:90] = 0
    level = estimate_noise(y * mask, mask)
    assert level.sigma == pytest.approx(0.05, rel=0.06)
    assert np.isfinite(level.whiteness)  # from spectra, not from fits


# ---- JPEG


@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize(("quality", "sigma"), [(90, 0.05), (90, 0.1), (75, 0.1)])
def test_noise_before_jpeg(photo: torch.Tensor, quality: int, sigma: float, subsampling: int):
    level = estimate_noise(as_jpeg(photo + sigma * normals(*photo.shape), quality, subsampling))
    assert level.sigma == pytest.approx(sigma, rel=0.15)
    assert 0 < level.compression < sigma  # Q(c) - c is at most c
    assert level.total == pytest.approx(np.hypot(level.sigma, level.compression))


def test_grid_and_steps_of_a_file(photo: torch.Tensor):
    y = as_jpeg(photo + 0.05 * normals(*photo.shape), 90, 0)[0].numpy()
    assert find_grid(y) == (0, 0)
    assert find_grid(y[:, 3:, 6:]) == (5, 2)
    assert find_grid(eight_bits(photo)[0].numpy()) is None
    file = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(file, "JPEG", quality=90)
    with Image.open(file) as image:
        table = np.array(image.quantization[0]).reshape(8, 8)
    blocks = cut(y, grid=(0, 0)).values
    inside = ((blocks > 0) & (blocks < 1)).all((1, 2, 3))
    steps = find_steps(spectra(luma(blocks[inside])))
    seen = np.isfinite(steps) & (table > 2)  # decoding to whole numbers hides smaller ones
    assert seen.sum() > 50
    assert (steps == table)[seen].mean() > 0.95


def test_steps_of_numbers():
    random = np.random.default_rng(0)
    values = 12 * random.integers(-5, 6, 300) + 0.3 * random.standard_normal(300)
    assert step_of(values) == 12
    assert step_of(20 * random.standard_normal(3000)) == 0
    assert step_of(np.array([])) == 0
    assert rounded(np.array([7.0, -2.0, 9.0]), np.array([5.0, 5.0, np.inf])).tolist() == [5, 0, 0]


# ---- trust


def test_all_constant():
    flat = torch.full((1, 3, 64, 64), 0.5)
    level = estimate_noise(flat)
    assert level.sigma == pytest.approx(1 / 255 / 12**0.5)
    assert estimate_sigma(flat, bits=16) == pytest.approx(1 / 65535 / 12**0.5)
    assert not level.trusted
    assert "constant or clipped" in level.reason
    assert "pass --sigma-y NUMBER" in level.reason


def test_nothing_to_go_on():
    with pytest.raises(
        InputError, match="no block of 8 x 8 pixels has 16 known ones; pass --sigma"
    ):
        estimate_noise(torch.rand(1, 3, 7, 200))
    mask = torch.zeros(1, 64, 64)
    mask[:, ::4, ::4] = 1
    with pytest.raises(InputError, match="no block of 8 x 8"):
        estimate_noise(torch.rand(1, 3, 64, 64), mask)


def test_few_pixels():
    level = estimate_noise(0.5 + 0.05 * normals(1, 3, 16, 16))
    assert not level.trusted
    assert "pixels tell of it" in level.reason


def test_halves_that_disagree():
    y = 0.5 + 0.02 * normals(1, 3, 256, 256)
    y[..., 128:, :] += 0.08 * normals(1, 3, 128, 256, seed=1)
    level = estimate_noise(y)
    assert not level.trusted
    assert "in the upper half and" in level.reason


def test_noise_of_an_enlarged_picture():
    small = 0.5 + 0.1 * normals(1, 3, 128, 128)
    y = torch.nn.functional.interpolate(small, scale_factor=2, mode="bilinear")
    level = estimate_noise(y)
    assert not level.trusted
    assert "neighbouring pixels resemble each other" in level.reason
    assert level.whiteness < 0.6


def test_twelve_megapixels(photo: torch.Tensor):
    tile = eight_bits(photo + 0.05 * normals(*photo.shape))
    height, width = tile.shape[2:]
    y = tile.repeat(1, 1, 3000 // height + 1, 4000 // width + 1)[..., :3000, :4000]
    assert estimate_sigma(y) == pytest.approx(0.05, rel=0.06)
    assert len(cut(y[0].numpy())) <= 12000


# ---- the tests find mistakes


def test_selection_by_fine_power_is_noticed(photo: torch.Tensor, monkeypatch: pytest.MonkeyPatch):
    """Smooth blocks chosen by the power that is then measured are chosen for little noise."""

    def wrong(self: Component, share: float = 0.1) -> Component:
        fine = self.power(np.add.outer(np.arange(8), np.arange(8)) >= 8)
        return self.take(np.argsort(fine)[: len(fine) // 10])

    monkeypatch.setattr(Component, "smooth", wrong)
    assert estimate_sigma(photo + 0.05 * normals(*photo.shape)) < 0.94 * 0.05


def test_clipping_that_is_ignored_is_noticed(photo: torch.Tensor, monkeypatch: pytest.MonkeyPatch):
    def wrong(means: np.ndarray, sigma: float, ends: tuple[float, float]) -> np.ndarray:
        return np.full(means.shape, sigma**2)

    strong = ((photo - 0.5) * 2.5 + 0.5).clamp(0, 1)
    clipped = eight_bits(strong + 0.2 * normals(*photo.shape))
    monkeypatch.setattr("invguide.images.smooth_blocks.clipped_variance", wrong)
    assert estimate_sigma(clipped) < 0.92 * 0.2


def test_a_level_is_a_tuple():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        level = estimate_noise(0.5 + 0.05 * normals(1, 1, 64, 64))
    assert isinstance(level, NoiseLevel)
    assert list(level._asdict())[:3] == ["sigma", "luma", "chroma"]
