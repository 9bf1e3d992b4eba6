"""The trainer: it learns, resumes, and writes weights and a card that the package can use."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from invguide.priors.checkpoints.embedded import read_unet
from invguide.priors.networks.unet import UNet
from invguide.training import trainer
from invguide.training.card import model_card
from invguide.training.photos import Crops, centre_crops, load_photos, split_photos
from invguide.training.trainer import TrainingConfig, draw_sigmas, train, validate


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Smooth colour ramps in random directions: easy to learn, and nothing like the network's start."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    folder.mkdir()
    rows, columns = np.mgrid[0:48, 0:56] / 48
    for i in range(60):
        a, b, c = rng.uniform(-1, 1, (3, 3))
        picture = 0.5 + 0.25 * (rows[..., None] * a + columns[..., None] * b + 0.5 * c)
        Image.fromarray((255 * picture.clip(0, 1)).astype(np.uint8)).save(folder / f"{i:03}.png")
    return folder


@pytest.mark.slow
def test_training_learns_resumes_and_ships(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock on which a step takes 0.1 s: how much is learned in a minute is a matter of the machine."""
    ticks = count()
    clock = SimpleNamespace(monotonic=lambda: 0.1 * next(ticks))
    monkeypatch.setattr(trainer, "time", clock)
    training, held_out = split_photos(load_photos(photos))
    assert len(training) == 59
    validation = {"held-out": centre_crops(held_out, 32)}
    untrained = validate(UNet(channels=(8, 16)), validation["held-out"], 0.5)
    config = TrainingConfig(minutes=0.1, phases=((1.0, 24, 16),), warmup_steps=5)
    out = tmp_path / "run"
    first = train(
        UNet(channels=(8, 16)), Crops(training), validation, config, out, compile_network=False
    )
    longer = replace(config, minutes=0.3)
    second = train(
        UNet(channels=(8, 16)), Crops(training), validation, longer, out, compile_network=False
    )
    # 6 and 18 seconds; whether tenths add up to the last of them is a matter of rounding.
    assert 60 <= first["step"] <= 61
    assert 180 <= second["step"] <= 182
    assert second["minutes"] == 0.3
    # Ramps are far easier than what the untrained network does, which is to shrink its input.
    assert second["validation_psnr"]["held-out"]["0.5"] > untrained["0.5"] + 2
    network, sigma_data = read_unet(out / "weights.safetensors")
    assert sigma_data == 0.5
    assert network.config["channels"] == [8, 16]
    card = model_card("toy", second, out / "weights.safetensors", command="make", hardware="CPU")
    assert "sha256" in card
    assert f"{second['step']:,} steps" in card


def test_noise_levels_follow_the_law_asked_for() -> None:
    config = TrainingConfig(minutes=1, wide_fraction=0.0)
    logs = draw_sigmas(np.random.default_rng(0), 20000, config).log()
    # Stratified draws: the mean is exact to the width of a stratum.
    assert logs.mean().item() == pytest.approx(config.log_sigma_mean, abs=0.01)
    assert logs.std().item() == pytest.approx(config.log_sigma_std, abs=0.01)


def test_folder_without_photos(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no photo found"):
        load_photos(tmp_path)
