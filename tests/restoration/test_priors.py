"""`invguide restore` with the checkpoint that one has: a file, a folder, a hub id, latent and conditional ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import invguide as ig
from invguide.images.reading import read_picture
from invguide.priors.checkpoints import loading
from invguide.priors.networks.adm import ADM, Architecture
from invguide.restoration.demo import PHOTO
from tiny import filled, run, stable_diffusion

SIZE = (38, 35)  # of the picture: no multiple of anything
QUICK = ("--task", "denoise", "--sigma-y", "0.1", "--steps", "2")
UNCHECKED = ("--prior-set", "check=False")  # random weights denoise nothing


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "cat.png"
    Image.open(PHOTO).crop((40, 40, 160, 148)).resize((SIZE[1], SIZE[0])).save(path)
    return path


def by_class(diffusers: Any, folder: Path) -> Path:
    """A network of pictures of 16 x 16 in 7 classes."""
    net = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        num_class_embeds=7,
    )
    filled(net, 0.05).save_pretrained(folder)
    diffusers.DDPMScheduler(prediction_type="sample").save_pretrained(folder)
    return folder


def told(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())["restore"]


@pytest.mark.slow
def test_text_latents_and_a_picture_of_any_size(photo: Path, tmp_path: Path, diffusers: Any):
    folder = stable_diffusion(diffusers, tmp_path / "sd")
    np.save(tmp_path / "text.npy", np.random.default_rng(0).normal(size=(1, 5, 16)))
    arguments = (photo, *QUICK, "--prior", folder, *UNCHECKED, "--samples", 2)
    text = ("--condition", f"text={tmp_path / 'text.npy'}")
    out = tmp_path / "out"
    assert "DPS, 2 steps, 2 samples" in run("restore", *arguments, *text, "--out", out)
    restored = read_picture(out / "restored-1.png")
    assert restored.size == SIZE
    assert told(out)["condition"] == {"text": str(tmp_path / "text.npy")}
    assert "done already" in run("restore", *arguments, *text, "--out", out, "--resume")

    np.save(tmp_path / "text.npy", np.random.default_rng(1).normal(size=(1, 5, 16)))
    changed = run("restore", *arguments, *text, "--out", out, "--resume", code=2)
    assert "another condition text file" in changed
    run("restore", *arguments, *text, "--out", tmp_path / "other")
    other = read_picture(tmp_path / "other" / "restored-1.png")
    assert not torch.equal(other.values, restored.values)
    assert "text (B, n, 16)" in run("restore", *arguments, "--out", out, code=2)
    tiled = run("restore", *arguments, *text, "--tile", 24, "--out", tmp_path / "tiles")
    assert "tiles     6 x 6" in tiled
    assert "tile is 15; expected a multiple of 4" in run(
        "restore", *arguments, *text, "--tile", 15, "--out", tmp_path / "tiles", code=2
    )
    assert "2 of the network" in run("plan", photo, "--task", "denoise", *arguments[5:-2], *text)


def test_every_weight_of_a_folder_is_in_the_identity(photo: Path, tmp_path: Path, diffusers: Any):
    folder = stable_diffusion(diffusers, tmp_path / "sd")
    files = loading.weight_files(str(folder))
    assert {file.parent.name for file in files} == {"unet", "vae"}
    np.save(tmp_path / "text.npy", np.zeros((1, 5, 16), np.float32))
    arguments = (photo, *QUICK, "--prior", folder, *UNCHECKED)
    arguments += ("--condition", f"text={tmp_path / 'text.npy'}", "--out", tmp_path / "out")
    run("restore", *arguments)
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    vae.decoder.conv_out.bias.data += 0.1
    vae.save_pretrained(folder / "vae")
    assert "another weights file" in run("restore", *arguments, "--resume", code=2)


def test_a_class_and_a_size_of_its_own(photo: Path, tmp_path: Path, diffusers: Any):
    folder = by_class(diffusers, tmp_path / "classes")
    arguments = (photo, *QUICK, "--solver", "dps", "--prior", folder, *UNCHECKED)
    outs = [tmp_path / name for name in ("a", "b")]
    for label, out in zip((3, 5), outs, strict=True):
        printed = run("restore", *arguments, "--condition", f"label={label}", "--out", out)
        assert "tiles     16 x 16" in printed
    a, b = (read_picture(out / "restored.png").values for out in outs)
    assert a.shape[2:] == SIZE
    assert not torch.equal(a, b)
    wrong = run("restore", *arguments, "--condition", "label=7", "--out", outs[0], code=2)
    assert "label" in wrong
    assert "7" in wrong


def test_a_hub_id(photo: Path, tmp_path: Path, diffusers: Any, monkeypatch: pytest.MonkeyPatch):
    folder = by_class(diffusers, tmp_path / "classes")
    asked = []

    def download(repository: str) -> Path:
        asked.append(repository)
        return folder

    monkeypatch.setattr(loading, "download", download)
    arguments = (photo, *QUICK, "--solver", "dps", *UNCHECKED, "--condition", "label=0")
    run("restore", *arguments, "--prior", "someone/faces-16", "--out", tmp_path / "a")
    run("restore", *arguments, "--prior", folder, "--out", tmp_path / "b")
    assert set(asked) == {"someone/faces-16"}
    assert told(tmp_path / "a")["sha256"] == told(tmp_path / "b")["sha256"]
    pictures = [(tmp_path / name / "restored.png").read_bytes() for name in "ab"]
    assert pictures[0] == pictures[1]


def test_what_a_weights_file_does_not_tell(photo: Path, tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(
        "invguide.priors.doctor.examine.QUICK", 0.0
    )  # a whole race of this network takes minutes
    net = ADM(Architecture(3, 6, 32, (32, 32), (False, True), 1), num_heads=2, qkv_order="new")
    torch.save(filled(net, 0.05).state_dict(), tmp_path / "mine.pt")
    arguments = (photo, *QUICK, "--solver", "dps", "--prior", tmp_path / "mine.pt")
    out = tmp_path / "out"
    assert "qkv_order" in run("restore", *arguments, "--out", out, code=2)
    settings = ("num_heads=2", "qkv_order=new", "predicts=x0", "schedule=cosine-vp")
    options = [part for setting in settings for part in ("--prior-set", setting)]
    doubted = run("restore", *arguments, *options, "--out", out)
    assert "the network denoises these signals under no convention" in doubted
    run("restore", *arguments, *options, *UNCHECKED, "--out", out)
    assert told(out)["prior_settings"]["schedule"] == "cosine-vp"
    options[-1] = "schedule=linear-vp"
    again = (*arguments, *options, *UNCHECKED, "--out", out, "--resume")
    changed = run("restore", *again, code=2)
    assert "prior_settings: " in changed
    wrong = run("restore", *arguments, "--prior-set", "num_head=2", "--out", out, code=2)
    assert "num_heads" in wrong


@pytest.mark.slow
def test_a_folder_of_pictures_on_workers(photo: Path, tmp_path: Path, diffusers: Any):
    folder = by_class(diffusers, tmp_path / "classes")
    (tmp_path / "in").mkdir()
    photo.rename(tmp_path / "in" / "cat.png")
    arguments = (tmp_path / "in", *QUICK, "--solver", "dps", "--prior", folder, *UNCHECKED)
    arguments += ("--condition", "label=2")
    run("restore", *arguments, "--workers", 1, "--out", tmp_path / "a")
    run("restore", *arguments, "--out", tmp_path / "b")
    pictures = [next((tmp_path / n).rglob("restored.png")).read_bytes() for n in "ab"]
    assert pictures[0] == pictures[1]


@pytest.mark.slow
def test_the_doctor_is_told_conditions(tmp_path: Path, diffusers: Any):
    folder = stable_diffusion(diffusers, tmp_path / "sd")
    assert "text (B, n, 16)" in run("doctor", folder, code=2)
    np.save(tmp_path / "text.npy", np.zeros((1, 5, 16), np.float32))
    printed = run("doctor", folder, "--condition", f"text={tmp_path / 'text.npy'}", code=1)
    assert "floor: the autoencoder alone" in printed


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("label", "--condition 'label'; expected NAME=VALUE, such as --condition label=207"),
        ("label=cat", "expected a whole number, such as a class, or a .npy file"),
        ("text=none.npy", "no such file: none.npy"),
        ("text=rows.npy", "has the shape (2, 5); expected one row"),
        ("text=broken.npy", "cannot be read"),
        ("text=words.npy", "expected numbers"),
    ],
)
def test_bad_conditions(told: str, message: str, photo: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("rows.npy", np.zeros((2, 5)))
    np.save("words.npy", np.array(["a cat"]))
    Path("broken.npy").write_bytes(b"no array")
    assert message in run("restore", photo, *QUICK, "--condition", told, code=2)


def test_a_prior_without_conditions_refuses_them(photo: Path, tmp_path: Path):
    tiny = ("--prior", "natural-tiny", "--out", tmp_path / "out")
    printed = run("restore", photo, *QUICK, *tiny, "--condition", "label=1", code=2)
    assert "given label; of conditions, its network UNet takes none" in printed


def test_a_latent_prior_of_one_size():
    """Decoded images are cropped, and reflected before they are encoded."""
    latent = ig.priors.from_network(lambda x, t: x, "x0", "ve", (4, None, None))
    fixed = ig.priors.from_network(lambda x, t: x, "x0", "ve", (4, 4, 4))

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.pixel_unshuffle(x, 2)

        def decode(self, z: torch.Tensor) -> torch.Tensor:
            return nn.functional.pixel_shuffle(z, 2)

    x = torch.rand(2, 1, 9, 14)
    for inside in (latent, fixed):
        prior = ig.priors.LatentPrior(
            inside, Halves(), scaling_factor=2.0, factor=2, channels=1
        ).for_size(9, 14)
        assert prior.sample_shape == (1, 9, 14)
        assert prior.normalised_shape((1, 9, 14)) == prior.shape == (4, 5, 7)
        z = prior.to_normalised(x)
        assert z.shape[1:] == prior.shape
        torch.testing.assert_close(prior.to_data(z), x)
        assert prior.denoise(z, 1.0).shape == z.shape
    with pytest.raises(ig.errors.ShapeError, match=r"for_size\(height, width\)"):
        ig.priors.LatentPrior(
            latent, Halves(), scaling_factor=1.0, factor=2, channels=1
        ).normalised_shape((1, 9, 14))
