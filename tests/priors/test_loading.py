"""load_prior: each family's own files and objects give the family's own E[x0 | x]; what does not fit is refused."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import invguide as ig
from invguide.cli.terminal import app
from invguide.errors import CheckpointError, InputError
from invguide.priors.checkpoints import loading
from invguide.priors.checkpoints.adm import PRESETS
from invguide.priors.checkpoints.catalogue import PUBLIC, RECOGNISED
from invguide.priors.checkpoints.loading import load, weight_files
from tiny import randomised

SIGMAS = (0.02, 0.2, 1.0, 5.0, 50.0)


pytestmark = pytest.mark.usefixtures("unchecked")


def error(
    prior: ig.Prior, expected: Callable[[Tensor, Tensor], Tensor], **condition: Any
) -> float:
    """Largest difference at five levels, relative to that of the output of a network of order one."""
    worst = 0.0
    for sigma in SIGMAS:
        if not prior.sigma_min <= sigma <= prior.sigma_max:
            continue
        x = torch.randn(2, *(size or 16 for size in prior.shape)) * max(1.0, sigma)
        with torch.no_grad():
            difference = prior.denoise(x, sigma, **condition) - expected(x, torch.tensor(sigma))
        worst = max(worst, float(difference.abs().max()) / max(1.0, sigma))
    return worst


# ---- deepinv


@pytest.fixture(scope="module")
def models() -> Any:
    return pytest.importorskip("deepinv.models")


def in_minus_one_to_one(net: Any, **condition: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """A denoiser of images in [0, 1] for images in [-1, 1]: both x and sigma are halved."""
    return lambda x, sigma: 2 * net(0.5 * x + 0.5, 0.5 * sigma, **condition) - 1


def test_deepinv_image_denoiser(models: Any):
    net = randomised(models.DRUNet(3, 3, nc=[8, 8, 8, 8], nb=1, pretrained=None))
    prior = load(net, sigma_max=80.0, shape=(3, 16, 16))
    assert error(prior, in_minus_one_to_one(net)) < 1e-5
    assert load(net).sigma_max == pytest.approx(100 / 255)
    assert load(net).to_data(torch.tensor([-1.0, 1.0])).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("trained_on", [False, True])
def test_deepinv_class_conditional(models: Any, trained_on: bool):
    net = randomised(
        models.ADMUNet(
            img_resolution=16,
            label_dim=4,
            model_channels=64,
            channel_mult=(1, 2),
            num_blocks=1,
            attn_resolutions=[8],
            pretrained=None,
            _was_trained_on_minus_one_one=trained_on,
        )
    )
    prior = load(net, shape=(3, 16, 16))
    rows = torch.tensor([[0.0, 0, 0, 1], [1, 0, 0, 0]])
    condition = {"label": torch.tensor([3, 0])}
    # The output is about ten times as large as x here, in float32.
    assert error(prior, in_minus_one_to_one(net, class_labels=rows), **condition) < 1e-4
    wrong = {"label": torch.tensor([0, 3])}
    assert error(prior, in_minus_one_to_one(net, class_labels=rows), **wrong) > 1e-2
    assert (prior.sigma_min, prior.sigma_max) == ((0.002, 80.0) if trained_on else (0.004, 160.0))


@pytest.mark.parametrize("kind", ["ncsn", "ddpm"])
def test_deepinv_ncsnpp(models: Any, kind: str):
    net = models.NCSNpp(
        kind, img_resolution=16, in_channels=1, out_channels=1, model_channels=32, channel_mult=(1, 2), num_blocks=1,
        attn_resolutions=[8], pretrained=None,
    )  # fmt: skip
    prior = load(randomised(net))
    assert prior.shape == (1, None, None)
    # The output is about ten times as large as x here, in float32.
    assert error(prior, in_minus_one_to_one(net)) < 1e-4


def test_deepinv_diffunet_without_its_clipping(models: Any):
    net = randomised(models.DiffUNet(pretrained=None))
    prior = load(net)
    k, x = 400, torch.randn(1, 3, 32, 32)
    bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[k]
    with torch.no_grad():
        eps = net.forward_diffusion(math.sqrt(bar) * x, torch.tensor([k]))[:, :3]
    sigma = math.sqrt(1 / bar - 1)
    expected = x - sigma * eps
    assert expected.abs().max() > 1
    torch.testing.assert_close(prior.denoise(x, sigma), expected, rtol=1e-5, atol=1e-5)
    clipped = in_minus_one_to_one(net)(x, torch.tensor([sigma]))
    # At a step of the table, its own denoiser is the same but for the clipping.
    torch.testing.assert_close(expected.clamp(-1, 1), clipped, rtol=0, atol=1e-3)


def test_deepinv_wrapper_that_clips(models: Any):
    net = models.ScoreModelWrapper(nn.Identity(), sigma_t=lambda t: t, scale_t=lambda t: 1.0)
    with pytest.raises(InputError, match=r"cuts its output off.*clip_output=False"):
        load(net)


# ---- a network of one's own


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.layer(x) + time.reshape(-1, 1, 1, 1) / 1000


def test_a_network_and_its_file(tmp_path: Path):
    source = randomised(Net())
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}},
        tmp_path / "w.pt",
    )
    prior = load(Net(), weights=tmp_path / "w.pt", predicts="v", schedule="cosine-vp")
    expected = ig.priors.from_network(source, "v", "cosine-vp")
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(prior.denoise(x, 0.5), expected.denoise(x, 0.5))
    assert load(prior) is prior
    torch.save({"weight": torch.zeros(3)}, tmp_path / "w.pt")
    with pytest.raises(
        CheckpointError, match=r"does not fit Net \(2 missing, such as layer\.weight"
    ):
        load(Net(), weights=tmp_path / "w.pt", predicts="v", schedule="cosine-vp")


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (Net(), {}, "pass predicts= and schedule=, such as"),
    (Net(), {"predicts": "eps"}, "pass schedule=, such as"),
    (Net(), {"predicts": "eps", "schedule": "linear-vp", "qkv_order": "new"}, "got qkv_order="),
    ("natural-tiny", {"predicts": "eps"}, "an embedded prior has no settings"),
    ("natural-tiny", {"weights": "w.pt"}, "weights= fills a network that you pass"),
    ("natural-tiny", {"entry": "ema"}, "entry= picks a part of a weights file"),
    ("no-such.ckpt", {}, r"there is no file no-such\.ckpt"),
    ("folder", {}, r"folder has no config\.json"),
    (
        "other.pt",
        {},
        r"holds 1 tensors \(layer\.weight, \.\.\.\) of no network that is recognised",
    ),
]


@pytest.mark.parametrize(("where", "settings", "message"), REFUSED)
def test_refusals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: Any, settings: Any, message: str
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    torch.save({"layer.weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match=message):
        ig.load_prior(where, **settings)


def test_a_prior_takes_no_settings():
    with pytest.raises(InputError, match="a Prior is taken as it is"):
        load(ig.load_prior("natural-tiny"), shape=(3, 8, 8))


def test_a_family_is_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = SimpleNamespace(settings=None)

    def make(weights: Any, source: Any, *, width: int) -> ig.Prior:
        made.settings = (sorted(weights), source.name, width)
        return ig.load_prior("natural-tiny")

    mine = loading.Family("mine", lambda weights: "mine" in weights, make)
    monkeypatch.setattr(loading, "FAMILIES", (*loading.FAMILIES, mine))
    torch.save({"module.mine": torch.zeros(1)}, tmp_path / "w.pt")
    load(tmp_path / "w.pt", width=3)
    assert made.settings == (["mine"], "w.pt", 3)


# ---- what is listed


def test_the_command_line_lists_what_can_be_loaded():
    printed = CliRunner().invoke(app, ["priors"]).stdout
    for family in loading.FAMILIES:
        assert f"\n{family.name}  [ig.load_prior(" in printed
    for preset in PRESETS.values():
        assert f"\n{preset.name}  [ig.load_prior('{preset.files[0]}.pt')]" in printed
    for entry in (*RECOGNISED, *PUBLIC):
        assert f"[{entry.line}]" in printed
        call = ast.parse(entry.line, mode="eval").body
        assert isinstance(call, ast.Call)
        assert ast.unparse(call.func) == "ig.load_prior"


def test_paths_of_weights(tmp_path: Path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    for name in ("w.ckpt", "unet/diffusion_pytorch_model.bin"):
        (tmp_path / name).touch()
    found = {where: weight_files(str(tmp_path / where)) for where in ("w.ckpt", "")}
    assert found["w.ckpt"] == (tmp_path / "w.ckpt",)
    assert found[""] == (tmp_path / "unet" / "diffusion_pytorch_model.bin",)
    with pytest.raises(InputError, match=r"unknown prior 'w\.ckpt'"):
        weight_files("w.ckpt")


def test_a_denoiser_without_weights_was_not_trained_and_is_not_doubted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The doctor compares with the posterior mean, which total variation is not."""
    deepinv = pytest.importorskip("deepinv")
    monkeypatch.setattr("invguide.priors.doctor.examine.examine", None)
    prior = ig.load_prior(deepinv.models.TVDenoiser())
    assert prior.denoise(torch.rand(1, 3, 32, 32), 0.1).shape == (1, 3, 32, 32)
