"""`bench denoise` at toy size: its figures against the network, the noise and a planted denoiser, by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import invguide as ig
from invguide import bench
from invguide.bench import denoising, restoration
from invguide.bench.protocol import Protocol
from invguide.errors import InputError
from invguide.solvers import HQS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two corners of a photograph, 32 pixels."""
    photo = np.asarray(Image.open(ROOT / "invguide" / "data" / "chelsea.png").convert("RGB"))
    np.savez(tmp_path / "photos.npz", img_32=np.stack([photo[:32, :32], photo[-32:, -32:]]))
    return tmp_path / "photos.npz"


class _Hand:
    """In place of the package bm3d: half the picture, at a cost of its own."""

    told: list[float] = []

    @classmethod
    def bm3d_rgb(cls, z: np.ndarray, sigma: float) -> np.ndarray:
        assert z.shape == (32, 32, 3)
        cls.told.append(sigma)
        return z / 2


@pytest.mark.slow
def test_denoise_table(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(denoising, "find_spec", lambda name: name)
    monkeypatch.setattr(denoising, "import_module", lambda name: _Hand)
    monkeypatch.setattr(denoising.metadata, "version", lambda name: "0")
    common = {"size": 32, "photos": 2, "prior": "natural-tiny", "progress": False}
    settings = {**common, "levels": (25, 50), "solvers": [HQS(num_steps=2)], "out": tmp_path}
    table = bench.denoise(data, **settings)
    names = [row[0] for row in table.rows]
    auto = "auto: PosteriorMean"
    assert names == [
        "noisy", auto, "of eight views", "HQS", "CBM3D", "TV, best weight", "auto over CBM3D",
    ]  # fmt: skip
    assert _Hand.told == [25 / 255] * 2 + [50 / 255] * 2
    figures = table.figures
    for level in ("25", "50"):  # noise of the level told, unclipped but for the score
        noise = 10 ** (-np.mean(figures["noisy"][level]["psnr"]) / 20)
        assert noise == pytest.approx(float(level) / 255, rel=0.1)
        assert figures[auto][level]["nfe"] == [1, 1]
        assert figures["of eight views"][level]["nfe"] == [8, 8]
        # The network itself, by hand.
        protocol = Protocol(data, size=32, photos=2, noise=float(level) / 255)
        prior, y = ig.load_prior("natural-tiny"), protocol.likelihood("denoise", 1).y
        x = prior.to_data(
            prior.denoise(prior.to_normalised(y), torch.tensor(protocol.noise / prior.scale))
        )
        error = float((x.clamp(0, 1) - protocol.truth[1]).square().mean())
        assert figures[auto][level]["psnr"][1] == pytest.approx(-10 * np.log10(error), abs=1e-3)
        half = ((y / 2).clamp(0, 1) - protocol.truth[1]).square().mean()
        expected = -10 * float(torch.log10(half))
        assert figures["CBM3D"][level]["psnr"][1] == pytest.approx(expected, abs=1e-3)
    gain = np.mean(figures[auto]["50"]["psnr"]) - np.mean(figures["CBM3D"]["50"]["psnr"])
    assert table.rows[-1][2] == f"{gain:+.2f}"
    gains = [
        a - b
        for level in ("25", "50")
        for a, b in zip(figures["CBM3D"][level]["psnr"], figures["noisy"][level]["psnr"])
    ]
    cbm3d = table.rows[names.index("CBM3D")]
    assert cbm3d[3:5] == (f"{min(gains):+.2f}", str(sum(gain < 0 for gain in gains)))

    monkeypatch.setattr(restoration.driver, "run", None)  # all is in the folder
    monkeypatch.setattr(restoration, "restore_tv", None)
    assert str(bench.denoise(data, **settings)) == str(table)


def test_denoise_without_bm3d(data: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(denoising, "find_spec", lambda name: None)
    settings = {"size": 32, "photos": 1, "prior": "natural-tiny", "levels": [25]}
    table = bench.denoise(data, **settings, tv=False, progress=False)
    assert [row[0] for row in table.rows] == ["noisy", "auto: PosteriorMean", "of eight views"]
    assert "pip install bm3d" in str(table)
    for levels in ([], [0.0], [300.0]):
        with pytest.raises(InputError, match="expected numbers above 0"):
            bench.denoise(data, **{**settings, "levels": levels})
