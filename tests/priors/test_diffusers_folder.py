"""Folders of diffusers: its own schedulers give the same E[x0 | x]; what does not fit is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import invguide as ig
from invguide.errors import CheckpointError, InputError, MissingPackageError
from invguide.priors.checkpoints import diffusers_folder
from invguide.priors.checkpoints.loading import load
from tiny import randomised


def unet(diffusers: Any, **changed: Any) -> Any:
    torch.manual_seed(0)
    config = {
        "sample_size": 16,
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 16,
    }
    return randomised(diffusers.UNet2DModel(**(config | changed)))


def pred_original_sample(scheduler: Any, net: Any, x: Tensor, k: int, label: Any = None) -> Tensor:
    """The estimate of x0 by diffusers' own scheduler, for x = x_t / sqrt(abar) at step k."""
    x_t = x * scheduler.alphas_cumprod[k].sqrt()
    with torch.no_grad():
        output = net(x_t, torch.tensor(k), label).sample
    return scheduler.step(output, k, x_t).pred_original_sample


CONVENTIONS = [
    ("epsilon", "linear"),
    ("v_prediction", "scaled_linear"),
    ("sample", "squaredcos_cap_v2"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("prediction", "betas"), CONVENTIONS)
@pytest.mark.parametrize("labelled", [False, True])
def test_diffusers_pipeline(
    diffusers: Any, tmp_path: Path, prediction: str, betas: str, labelled: bool
):
    net = unet(diffusers, num_class_embeds=4 if labelled else None)
    scheduler = diffusers.DDPMScheduler(
        beta_schedule=betas, prediction_type=prediction, clip_sample=False
    )
    net.save_pretrained(tmp_path / "unet")
    scheduler.save_pretrained(tmp_path / "scheduler")
    prior = load(tmp_path)
    assert prior.shape == (3, 16, 16)
    label = torch.tensor([2, 0]) if labelled else None
    condition = {"label": label} if labelled else {}
    for k in (0, 40, 300, 700, 930):
        sigma = float((1 / scheduler.alphas_cumprod[k].double() - 1).sqrt())
        x = torch.randn(2, 3, 16, 16) * max(1, sigma)
        expected = pred_original_sample(scheduler, net, x, k, label)
        # float32 twice: that of the network, and of diffusers' own table, in which 1 - abar has an error of 6e-8.
        tolerance = 1e-5 * max(1, sigma, float(x.abs().max()))
        assert float((prior.denoise(x, sigma, **condition) - expected).abs().max()) < tolerance
    if labelled:
        with pytest.raises(InputError, match="conditional on one of 4 classes"):
            prior.denoise(x, 1.0)
    else:
        with pytest.raises(InputError, match="not conditional on a class"):
            prior.denoise(x, 1.0, label=torch.tensor([0, 1]))


def test_a_wrong_prediction_type_is_another_denoiser(diffusers: Any, tmp_path: Path):
    net = unet(diffusers)
    net.save_pretrained(tmp_path)
    scheduler = diffusers.DDPMScheduler(prediction_type="v_prediction", clip_sample=False)
    scheduler.save_pretrained(tmp_path)
    right, wrong = load(tmp_path), load(tmp_path, predicts="eps")
    wrong_betas = load(tmp_path, schedule="cosine-vp")
    x = torch.randn(2, 3, 16, 16)
    expected = pred_original_sample(scheduler, net, x, 400)
    sigma = float((1 / scheduler.alphas_cumprod[400] - 1).sqrt())
    assert float((right.denoise(x, sigma) - expected).abs().max()) < 1e-5
    for other in (wrong, wrong_betas):
        assert float((other.denoise(x, sigma) - expected).abs().max()) > 1e-2


def save_folder(diffusers: Any, folder: Path, **scheduler: Any) -> Any:
    """A model in one folder, as google/ddpm-* are; returns its network."""
    net = unet(diffusers)
    net.save_pretrained(folder)
    diffusers.DDPMScheduler(clip_sample=False).save_pretrained(folder)
    if scheduler:
        path = folder / "scheduler_config.json"
        path.write_text(json.dumps({"_class_name": "DDPMScheduler"} | scheduler))
    return net


def test_layouts_and_old_files(diffusers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    net = save_folder(diffusers, tmp_path / "flat")
    x = torch.randn(1, 3, 16, 16)
    expected = load(tmp_path / "flat").denoise(x, 0.7)
    assert expected.std() > 0.1

    pipeline = diffusers.DDPMPipeline(net, diffusers.DDPMScheduler(clip_sample=False))
    pipeline.save_pretrained(tmp_path / "pipeline")
    for folder in ("pipeline", "pipeline/unet"):
        assert torch.equal(load(tmp_path / folder).denoise(x, 0.7), expected)

    # Names of attention weights before diffusers 0.14, in a pickle.
    weights = load_file(tmp_path / "flat" / "diffusion_pytorch_model.safetensors")
    for new, old in (
        ("to_q", "query"),
        ("to_k", "key"),
        ("to_v", "value"),
        ("to_out.0", "proj_attn"),
    ):
        weights = {k.replace(f".{new}.", f".{old}."): v for k, v in weights.items()}
    assert any(".query." in name for name in weights)
    (tmp_path / "flat" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(weights, tmp_path / "flat" / "diffusion_pytorch_model.bin")
    assert torch.equal(load(tmp_path / "flat").denoise(x, 0.7), expected)

    # The network as an object, and a folder without a scheduler.
    told: Any = {"predicts": "eps", "schedule": "linear-vp"}
    as_object = load(net, **told, shape=(3, 16, 16))
    torch.testing.assert_close(as_object.denoise(x, 0.7), expected)
    (tmp_path / "flat" / "scheduler_config.json").unlink()
    assert torch.equal(load(tmp_path / "flat", **told).denoise(x, 0.7), expected)
    with pytest.raises(
        InputError, match=r"no scheduler_config\.json, .*pass predicts= and schedule="
    ):
        load(tmp_path / "flat")

    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'invguide\[diffusers\]'"):
        load(tmp_path / "pipeline")


def test_pipeline_objects(diffusers: Any, tmp_path: Path):
    """The same prior as that of their folder: a plain one, and a latent one whose autoencoder is taken too."""
    x = torch.randn(1, 3, 16, 16)
    for prediction in ("epsilon", "v_prediction"):
        scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type=prediction)
        pipeline = diffusers.DDIMPipeline(unet(diffusers), scheduler)
        pipeline.save_pretrained(tmp_path / prediction)
        expected = load(tmp_path / prediction).denoise(x, 0.7)
        assert torch.equal(load(pipeline).denoise(x, 0.7), expected)
    scheduler = diffusers.DDIMScheduler(beta_schedule="linear")
    vae = diffusers.VQModel(latent_channels=3, num_vq_embeddings=8)
    latent = diffusers.LDMPipeline(vae, unet(diffusers), scheduler)
    latent.save_pretrained(tmp_path / "latent")
    there, here = load(tmp_path / "latent"), load(latent)
    assert type(here) is type(there)
    assert torch.equal(here.denoise(x, 0.7), there.denoise(x, 0.7))
    assert torch.equal(here.to_data(x), there.to_data(x))
    with pytest.raises(InputError, match="no unet or transformer"):
        load(type("Empty", (diffusers.DiffusionPipeline,), {})())


def test_hub_ids_go_through_their_own_client(
    diffusers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import huggingface_hub

    asked: list[list[str]] = []

    def snapshot_download(repository: str, allow_patterns: list[str]) -> str:
        assert repository == "someone/ddpm-faces"
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    save_folder(diffusers, tmp_path)
    assert load("someone/ddpm-faces").shape == (3, 16, 16)
    assert asked == [["*.json"], ["*.json", "diffusion_pytorch_model.safetensors"]]

    (tmp_path / "config.json").write_text('{"_class_name": "UNet1DModel"}')
    asked.clear()
    with pytest.raises(InputError, match="holds a UNet1DModel; of diffusers, only UNet2DModel"):
        load("someone/ddpm-faces")
    assert asked == [["*.json"]]  # refused before the weights are fetched

    def offline(*_: Any, **__: Any) -> str:
        raise OSError("no route to the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(InputError, match=r"no embedded prior, no file or folder here, .*no route"):
        load("someone/ddpm-faces")


# ---- weights in several files

INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture
def sharded(diffusers: Any, tmp_path: Path) -> tuple[Path, Tensor]:
    """A folder whose weights are in several files, and what its prior makes of ones."""
    net = save_folder(diffusers, tmp_path)
    expected = load(tmp_path).denoise(torch.ones(1, 3, 16, 16), 0.7)
    net.save_pretrained(tmp_path, max_shard_size="400KB")
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink(missing_ok=True)
    return tmp_path, expected


def test_weights_in_several_files(sharded: tuple[Path, Tensor], monkeypatch: pytest.MonkeyPatch):
    folder, expected = sharded
    files = diffusers_folder.weight_files(folder)
    assert set(files) == set(folder.glob("*.safetensors"))
    assert len(files) >= 3
    assert torch.equal(load(folder).denoise(torch.ones(1, 3, 16, 16), 0.7), expected)

    import huggingface_hub

    asked: list[list[str]] = []

    def snapshot_download(_: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert torch.equal(load("a/b").denoise(torch.ones(1, 3, 16, 16), 0.7), expected)
    assert asked == [["*.json"], ["*.json", *(file.name for file in files)]]


def rename_in_index(folder: Path, new: Callable[[str], Any]) -> None:
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"] = {k: new(v) for k, v in content["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(content))


def drop_shard(folder: Path) -> None:
    diffusers_folder.weight_files(folder)[1].unlink()


def truncate_shard(folder: Path) -> None:
    file = diffusers_folder.weight_files(folder)[1]
    file.write_bytes(file.read_bytes()[:1000])


def swap_shards(folder: Path) -> None:
    first, second = diffusers_folder.weight_files(folder)[:2]
    first.write_bytes(second.read_bytes())


def one_more_in_shard(folder: Path) -> None:
    file = diffusers_folder.weight_files(folder)[0]
    save_file(load_file(file) | {"another.weight": torch.zeros(1)}, file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_shard, r"index\.json names \d files, and 1 of them \(such as .*-00002-of-"),
        (truncate_shard, "cannot be read as weights"),
        (swap_shards, r"00001-of-.* does not hold what .*index\.json says \(\d+ names differ"),
        (one_more_in_shard, r"1 names differ, such as another\.weight"),
        (lambda folder: (folder / INDEX).write_text("{"), "is not JSON"),
        (lambda folder: (folder / INDEX).write_text("{}"), "is no index of weights"),
        (lambda folder: rename_in_index(folder, lambda name: f"../{name}"), "is no index of"),
        (lambda folder: rename_in_index(folder, lambda _: "/dev/zero"), "is no index of weights"),
        (lambda folder: rename_in_index(folder, lambda _: 1), "is no index of weights"),
    ],
)
def test_damaged_shards(sharded: tuple[Path, Tensor], damage: Callable[[Path], Any], message: str):
    damage(sharded[0])
    with pytest.raises(CheckpointError, match=message):
        load(sharded[0])


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        ({"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid' is not known here"),
        (
            {"beta_schedule": "linear", "prediction_type": "flow"},
            r"DDPMScheduler \(prediction_type 'flow', .*\) is not known here: pass predicts=",
        ),
        (
            {
                "beta_schedule": "scaled_linear",
                "prediction_type": "v_prediction",
                "timestep_type": "continuous",
            },
            "timestep_type 'continuous'",
        ),
        ({"_class_name": "KarrasVeScheduler"}, "KarrasVeScheduler .* is not known here"),
        ({"beta_schedule": "linear", "num_train_timesteps": 10**12}, "expected 2 to 100000"),
    ],
)
def test_unknown_schedulers(scheduler: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        diffusers_folder.convention({"_class_name": "DDPMScheduler"} | scheduler)


def test_tables_of_schedulers(diffusers: Any):
    for changed in (
        {"beta_schedule": "linear", "num_train_timesteps": 50, "beta_end": 0.3},
        {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
        {"trained_betas": [0.1, 0.2, 0.3]},
    ):
        config = diffusers.DDIMScheduler(**changed)
        found = diffusers_folder.alphas_bar(config.config)
        # The table of diffusers is a product of up to 1000 factors in float32.
        np.testing.assert_allclose(found, config.alphas_cumprod, atol=1e-6)


def linear_error(prior: ig.Prior) -> float:
    """Of the denoiser of data N(0, 1), relative to x."""
    x = torch.randn(2, 3)
    levels = (0.02, 0.2, 1.0, 5.0, 50.0)
    return max(float((prior.denoise(x, s) - x / (1 + s**2)).abs().max()) for s in levels)


def test_score_and_flow_schedulers():
    """By the definitions of both in the variables of their papers, with a linear network."""
    ve = {"_class_name": "ScoreSdeVeScheduler", "sigma_min": 0.01, "sigma_max": 1348.0}
    prior = ig.priors.from_network(
        lambda x, sigma: (
            -x / (1 + sigma[:, None] ** 2)
        ),  # the score of data N(0, 1) at level sigma
        shape=(3,),
        **diffusers_folder.convention(ve),
    )
    assert (prior.sigma_min, prior.sigma_max, prior.scale) == (0.01, 1348.0, 1.0)
    assert linear_error(prior) < 1e-5
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}

    def velocity(
        z: Tensor, step: Tensor
    ) -> Tensor:  # E[n - x0 | z = (1 - t) x0 + t n], data N(0, 1)
        t = step[:, None] / 1000
        return (2 * t - 1) * z / (t**2 + (1 - t) ** 2)

    prior = ig.priors.from_network(velocity, shape=(3,), **diffusers_folder.convention(flow))
    assert linear_error(prior) < 1e-5


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def wrong_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"block_out_channels": [32]}))


def huge_config(folder: Path) -> None:
    """Would take terabytes if it were built before it is compared."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"block_out_channels": [32, 2**19]}))


def drop_weight(folder: Path) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if k != "conv_in.bias"}, path)


def no_weights(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_config, r"config\.json is not JSON"),
        (wrong_config, r"config\.json is refused by diffusers"),
        (huge_config, "of another shape"),
        (drop_weight, r"1 missing, such as conv_in\.bias.*no weight is ever left at random"),
        (no_weights, r"has no weights; expected diffusion_pytorch_model\.safetensors"),
    ],
)
def test_damaged_folders(
    diffusers: Any, tmp_path: Path, damage: Callable[..., None], message: str
):
    save_folder(diffusers, tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)
