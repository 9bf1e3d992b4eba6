"""Families of diffusers beyond text: folders that it has saved give what its own network and scheduler give."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import invguide as ig
import tiny
from invguide.errors import CheckpointError, InputError
from invguide.operators import SuperResolution
from invguide.priors import LatentPrior
from invguide.priors.checkpoints.catalogue import PUBLIC
from invguide.priors.checkpoints.diffusers_folder import weight_files
from invguide.priors.checkpoints.diffusers_models import as_network
from invguide.solvers import DPS

PIXELS = 4  # per latent, of the autoencoder below
SHAPE = (4, 8, 12)  # of latents: not square, so that rows and columns are told apart
Call = Callable[..., Tensor]  # (input of the network, its time, **condition) -> its output


pytestmark = pytest.mark.usefixtures("unchecked")


def saved(folder: Path, net: Any, scheduler: Any, part: str, **vae: Any) -> LatentPrior:
    """The prior of a pipeline's folder."""
    diffusers: Any = pytest.importorskip("diffusers")
    net.save_pretrained(folder / part)
    scheduler.save_pretrained(folder / "scheduler")
    autoencoder = tiny.autoencoder(diffusers, channels=16, norm_num_groups=8, **vae)
    tiny.filled(autoencoder).save_pretrained(folder / "vae")
    prior = ig.load_prior(folder)
    assert isinstance(prior, LatentPrior)
    assert (prior.shape, prior.factor) == ((4, None, None), PIXELS)
    return prior


def euler(scheduler: Any, call: Call, x: Tensor, k: int) -> Tensor:
    """x0 by an EulerDiscreteScheduler, which holds x = x0 + sigma n, at its k-th step of five."""
    scheduler.set_timesteps(5)
    t = scheduler.timesteps[k]
    output = call(scheduler.scale_model_input(x, t), t.expand(len(x)))
    return scheduler.step(output, t, x).pred_original_sample


def ddim(scheduler: Any, call: Call, x: Tensor, k: int) -> Tensor:
    """x0 by a DDIMScheduler, which holds x_t = sqrt(abar) x, at step k."""
    scheduler.set_timesteps(1000)
    x_t = x * scheduler.alphas_cumprod[k].sqrt()
    return scheduler.step(call(x_t, torch.full((len(x),), k)), k, x_t).pred_original_sample


def flow(scheduler: Any, call: Call, x: Tensor, level: float) -> Tensor:
    """x0 by a FlowMatchEulerDiscreteScheduler: its one step from t to 0, from (1 - t) x."""
    scheduler.set_timesteps(sigmas=[level])
    x_t = x * (1 - scheduler.sigmas[0])
    t = scheduler.timesteps[0]
    return scheduler.step(call(x_t, t.expand(len(x))), t, x_t).prev_sample


def agree(
    prior: ig.Prior, levels: list[tuple[float, Any]], x0_of: Callable[..., Tensor], **told: Tensor
) -> None:
    """Denoised, and products with the Jacobian, are those of the family at five of its levels."""
    assert len(levels) == 5
    for sigma, step in levels:
        x = (torch.randn(2, *SHAPE) * max(1.0, sigma)).requires_grad_()
        found, expected = prior.denoise(x, sigma, **told), x0_of(x, step)
        # The family multiplies its network's float32 output by sigma: errors are relative to that, or to x.
        scale = max(1.0, sigma, float(x.detach().abs().max()))
        assert float((found - expected).detach().abs().max()) < 1e-5 * scale
        direction = torch.randn_like(x)
        (ours,), (theirs,) = (torch.autograd.grad(v, x, direction) for v in (found, expected))
        assert float((ours - theirs).abs().max()) < 1e-5 * max(1.0, float(theirs.abs().max()))
        assert float((ours - direction).abs().max()) > 1e-4  # there is a network in it


def restores(prior: ig.Prior, **told: Tensor) -> None:
    """One row of conditions for each measurement, two samples each."""
    y = torch.rand(1, 3, 16, 16)
    condition = {name: value[:1] for name, value in told.items()}
    result = ig.solve(
        y, SuperResolution(2, "box"), prior, sigma_y=0.1, solver=DPS(num_steps=2), num_samples=2,
        condition=condition, seed=0,
    )  # fmt: skip
    assert result.samples.shape == (1, 2, 3, 32, 32)
    assert bool(result.samples.isfinite().all())


# ---- Stable Diffusion XL


def sdxl_unet(diffusers: Any, **changed: Any) -> Any:
    settings = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 12 + 6 * 8,
    }
    return tiny.filled(diffusers.UNet2DConditionModel(**(settings | changed)))


def sdxl_scheduler(diffusers: Any, prediction: str) -> Any:
    return diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        prediction_type=prediction, timestep_spacing="leading", steps_offset=1,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prediction", "projected"), [("epsilon", False), ("v_prediction", False), ("epsilon", True)]
)
def test_sdxl(diffusers: Any, tmp_path: Path, prediction: str, projected: bool):
    """Two embeddings and six sizes; `projected` is Kolors, whose wider text the network makes narrow itself."""
    changed = {"encoder_hid_dim": 20, "encoder_hid_dim_type": "text_proj"} if projected else {}
    net, scheduler = sdxl_unet(diffusers, **changed), sdxl_scheduler(diffusers, prediction)
    prior = saved(tmp_path, net, scheduler, "unet", scaling_factor=0.13025)
    told = {"text": torch.randn(2, 5, 20 if projected else 16), "pooled": torch.randn(2, 12)}
    natural = torch.tensor([[32.0, 48, 0, 0, 32, 48]]).expand(2, 6)  # of latents of 8 x 12

    def x0_of(
        x: Tensor, k: int, sizes: Tensor = natural, pooled: Tensor = told["pooled"]
    ) -> Tensor:
        def call(z: Tensor, t: Tensor) -> Tensor:
            added = {"text_embeds": pooled, "time_ids": sizes}
            return net(z, t, encoder_hidden_states=told["text"], added_cond_kwargs=added).sample

        return euler(scheduler, call, x, k)

    scheduler.set_timesteps(5)
    levels = [(float(sigma), k) for k, sigma in enumerate(scheduler.sigmas[:5])]
    agree(prior, levels, x0_of, **told)
    cropped = torch.tensor([[512.0, 640, 10, 0, 32, 48], [100, 200, 0, 30, 64, 64]])
    agree(prior, levels, lambda x, k: x0_of(x, k, cropped), **told, sizes=cropped)
    x = torch.randn(2, *SHAPE)
    found = prior.denoise(x, levels[2][0], **told)
    for wrong in (x0_of(x, 2, cropped), x0_of(x, 2, pooled=told["pooled"].flip(0)), x0_of(x, 3)):
        assert float((found - wrong).abs().max()) > 1e-3
    whole = prior.denoise(x, levels[2][0], **told, sizes=natural.long())
    assert torch.equal(found, whole)
    if prediction == "v_prediction":  # random weights give noise, which eps multiplies by sigma
        restores(prior, **told, sizes=cropped)


def test_sizes_are_in_pixels_of_the_autoencoder(diffusers: Any):
    """Also of a network that is passed as an object; without an autoencoder, eight pixels per latent."""
    net = sdxl_unet(diffusers)
    latent = ig.load_prior(
        net, predicts="eps", schedule="scaled-linear-vp", shape=(4, None, None), data_range=(0, 1),
        multiple=2,
    )  # fmt: skip
    told = {"text": torch.randn(1, 5, 16), "pooled": torch.randn(1, 12)}
    x = torch.randn(1, *SHAPE)

    def sized(prior: ig.Prior, pixels: int) -> bool:
        height, width = 8 * pixels, 12 * pixels
        sizes = torch.tensor([[height, width, 0, 0, height, width]])
        return torch.equal(
            prior.denoise(x, 1.0, **told), prior.denoise(x, 1.0, **told, sizes=sizes)
        )

    assert (sized(latent, 8), sized(latent, 16)) == (True, False)
    prior = LatentPrior(latent, tiny.autoencoder(diffusers), scaling_factor=1.0, factor=16)
    assert (sized(prior, 8), sized(prior, 16)) == (False, True)


# ---- FLUX.1


def flux(diffusers: Any, **changed: Any) -> Any:
    settings = {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 12,
        "axes_dims_rope": (4, 6, 6),
    }
    return tiny.filled(diffusers.FluxTransformer2DModel(**(settings | changed)))


def packed(z: Tensor) -> Tensor:
    """Each square of 2 x 2 latents is one token; its channels are in the order (latent channel, row, column)."""
    rows = [
        [z[:, c, i + a, j + b] for c in range(4) for a in (0, 1) for b in (0, 1)]
        for i in range(0, SHAPE[1], 2)
        for j in range(0, SHAPE[2], 2)
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], 1)


def unpacked(tokens: Tensor) -> Tensor:
    z = tokens.new_zeros(len(tokens), *SHAPE)
    places = [(i, j) for i in range(0, SHAPE[1], 2) for j in range(0, SHAPE[2], 2)]
    for token, (i, j) in enumerate(places):
        for c in range(4):
            for a in (0, 1):
                for b in (0, 1):
                    z[:, c, i + a, j + b] = tokens[:, token, 4 * c + 2 * a + b]
    return z


@pytest.mark.slow
@pytest.mark.parametrize("distilled", [False, True])
def test_flux(diffusers: Any, tmp_path: Path, distilled: bool):
    net = flux(diffusers, guidance_embeds=distilled)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0 if distilled else 1.0)
    prior = saved(
        tmp_path, net, scheduler, "transformer", scaling_factor=0.3611, shift_factor=0.1159
    )
    assert (prior.scaling_factor, prior.shift_factor) == (0.3611, 0.1159)
    told = {"text": torch.randn(2, 5, 16), "pooled": torch.randn(2, 12)}
    places = torch.tensor([[0.0, i, j] for i in range(4) for j in range(6)])

    def x0_of(x: Tensor, level: float, guidance: float = 3.5, ids: Tensor = places) -> Tensor:
        def call(z: Tensor, t: Tensor) -> Tensor:
            velocity = net(
                packed(z),
                timestep=t / 1000,
                guidance=torch.full((2,), guidance) if distilled else None,
                encoder_hidden_states=told["text"],
                pooled_projections=told["pooled"],
                txt_ids=torch.zeros(5, 3),
                img_ids=ids,
            ).sample
            return unpacked(velocity)

        return flow(scheduler, call, x, level)

    levels = []
    for level in (0.02, 0.2, 0.5, 0.8, 0.97):
        scheduler.set_timesteps(sigmas=[level])
        t = float(scheduler.sigmas[0])
        levels.append((t / (1 - t), level))
    agree(prior, levels, x0_of, **told)
    x = torch.randn(2, *SHAPE)
    found = prior.denoise(x, levels[2][0], **told)
    assert float((found - x0_of(x, 0.5, ids=places[:, [0, 2, 1]])).abs().max()) > 1e-4
    scale = torch.tensor([1.5, 1.5])
    if distilled:
        agree(prior, levels, lambda x, k: x0_of(x, k, 1.5), **told, guidance=scale)
        assert float((found - x0_of(x, 0.5, 1.5)).abs().max()) > 1e-3
        restores(prior, **told, guidance=scale)
    else:
        with pytest.raises(InputError, match=r"got text .*, guidance \(2,\)"):
            prior.denoise(x, 1.0, **told, guidance=scale)
        restores(prior, **told)


def test_flux_in_several_files(diffusers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As the large models are: every file of the network, and that of the autoencoder."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    net = flux(diffusers)
    prior = saved(tmp_path, net, scheduler, "transformer")
    told = {"text": torch.randn(1, 5, 16), "pooled": torch.randn(1, 12)}
    x = torch.randn(1, *SHAPE)
    expected = prior.denoise(x, 1.0, **told)
    (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    net.save_pretrained(tmp_path / "transformer", max_shard_size="60KB")
    files = weight_files(tmp_path)
    assert [file.parent.name for file in files] == ["transformer"] * (len(files) - 1) + ["vae"]
    assert len(files) >= 3
    assert torch.equal(ig.load_prior(tmp_path).denoise(x, 1.0, **told), expected)

    hub: Any = pytest.importorskip("huggingface_hub")
    asked: list[str] = []

    def snapshot_download(_: str, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert torch.equal(ig.load_prior("a/flux").denoise(x, 1.0, **told), expected)
    names = [file.relative_to(tmp_path).as_posix() for file in files]
    assert [name for name in asked if name != "*.json"] == names

    files[1].unlink()
    with pytest.raises(CheckpointError, match="and 1 of them"):
        ig.load_prior(tmp_path)


# ---- PixArt


def pixart(diffusers: Any, name: str = "PixArtTransformer2DModel", **changed: Any) -> Any:
    settings = {
        "sample_size": 16,
        "patch_size": 2,
        "num_layers": 1,
        "num_attention_heads": 3,
        "attention_head_dim": 8,
        "cross_attention_dim": 24,
        "caption_channels": 16,
    }
    return tiny.filled(getattr(diffusers, name)(**(settings | changed)))


@pytest.mark.parametrize("told_sizes", [False, True])
def test_pixart(diffusers: Any, tmp_path: Path, told_sizes: bool):
    """A learned variance, positions that no file holds, and a mask of the text."""
    net = pixart(diffusers, use_additional_conditions=told_sizes)
    scheduler = diffusers.DDIMScheduler(clip_sample=False)  # linear betas
    prior = saved(tmp_path, net, scheduler, "transformer")
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    told = {"text": torch.randn(2, 5, 16), "text_mask": mask}
    natural = torch.tensor([[32.0, 48]]).expand(2, 2)

    def x0_of(x: Tensor, k: int, sizes: Tensor = natural, mask: Tensor | None = mask) -> Tensor:
        added = {"resolution": sizes, "aspect_ratio": sizes[:, :1] / sizes[:, 1:]}

        def call(z: Tensor, t: Tensor) -> Tensor:
            output = net(
                z,
                timestep=t,
                encoder_hidden_states=told["text"],
                encoder_attention_mask=mask,
                added_cond_kwargs=added
                if told_sizes
                else {"resolution": None, "aspect_ratio": None},
            )
            return output.sample[:, :4]

        return ddim(scheduler, call, x, k)

    products = scheduler.alphas_cumprod.double()
    levels = [(float((1 / products[k] - 1).sqrt()), k) for k in (3, 150, 500, 700, 900)]
    agree(prior, levels, x0_of, **told)
    agree(prior, levels, lambda x, k: x0_of(x, k, mask=None), text=told["text"])
    x, sizes = torch.randn(2, *SHAPE), torch.tensor([[512.0, 768], [640, 640]])
    found = prior.denoise(x, levels[2][0], **told)
    assert float((found - x0_of(x, 500, mask=None)).abs().max()) > 1e-3
    if told_sizes:
        agree(prior, levels, lambda x, k: x0_of(x, k, sizes), **told, sizes=sizes)
        assert float((found - x0_of(x, 500, sizes)).abs().max()) > 1e-3
    else:
        with pytest.raises(InputError, match=r"may be told text_mask \(B, n\), with"):
            prior.denoise(x, 1.0, **told, sizes=sizes)


OLD = {
    "in_channels": 4,
    "out_channels": 8,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
}


@pytest.mark.parametrize("norm", ["ada_norm_single", "ada_norm_zero"])
def test_published_folders_of_pixart_and_dit(diffusers: Any, tmp_path: Path, norm: str):
    """They name the class that both have been, which diffusers still has: its output is the oracle."""
    single = norm == "ada_norm_single"
    changed = {} if single else {"cross_attention_dim": None, "caption_channels": None}
    count = 1000 if single else 5
    net = pixart(
        diffusers, "Transformer2DModel", norm_type=norm, num_embeds_ada_norm=count, **OLD, **changed
    )  # fmt: skip
    net.save_pretrained(tmp_path)
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.save_pretrained(tmp_path)
    assert (
        json.loads((tmp_path / "config.json").read_text())["_class_name"] == "Transformer2DModel"
    )
    told = {"text": torch.randn(2, 5, 16)} if single else {"label": torch.tensor([1, 4])}
    own = (
        {"encoder_hidden_states": told["text"], "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        if single
        else {"class_labels": told["label"]}
    )  # fmt: skip
    prior, x = ig.load_prior(tmp_path), torch.randn(2, 4, 16, 16)

    def call(z: Tensor, t: Tensor) -> Tensor:
        return net(z, timestep=t, **own).sample[:, :4]

    sigma = float((1 / scheduler.alphas_cumprod[400].double() - 1).sqrt())
    assert (
        float((prior.denoise(x, sigma, **told) - ddim(scheduler, call, x, 400)).abs().max())
        < 1e-5 * sigma * 4
    )
    config = json.loads((tmp_path / "config.json").read_text()) | {"norm_type": "layer_norm"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="holds a Transformer2DModel; of diffusers, only"):
        ig.load_prior(tmp_path)


# ---- latent diffusion without a text


@pytest.mark.parametrize("written", [False, True])
def test_latent_diffusion_with_a_quantising_autoencoder(
    diffusers: Any, tmp_path: Path, written: bool
):
    """CompVis/ldm-celebahq-256: a UNet2DModel over latents of a VQModel whose file tells no scale, that is 1."""
    net = tiny.filled(
        diffusers.UNet2DModel(
            sample_size=8, block_out_channels=(16, 16), norm_num_groups=8, layers_per_block=1,
            down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        )
    )  # fmt: skip
    vae = tiny.filled(
        diffusers.VQModel(
            block_out_channels=(16, 16, 16), norm_num_groups=8, num_vq_embeddings=32, scaling_factor=0.5,
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        )
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    for part, model in (("unet", net), ("vqvae", vae), ("scheduler", scheduler)):
        model.save_pretrained(tmp_path / part)
    config = json.loads((tmp_path / "vqvae" / "config.json").read_text())
    if not written:
        del config["scaling_factor"]
        (tmp_path / "vqvae" / "config.json").write_text(json.dumps(config))
    prior = ig.load_prior(tmp_path)
    assert isinstance(prior, LatentPrior)
    assert (prior.shape, prior.sample_shape, prior.factor) == ((3, 8, 8), (3, 32, 32), 4)
    assert [file.parent.name for file in weight_files(tmp_path)] == ["unet", "vqvae"]
    scale = 0.5 if written else 1.0
    z, x = torch.randn(2, 3, 8, 8), torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(prior.to_data(z), vae.decode(z / scale).sample / 2 + 0.5)
    torch.testing.assert_close(prior.to_normalised(x), vae.encode(2 * x - 1).latents * scale)

    sigma = float((1 / scheduler.alphas_cumprod[400].double() - 1).sqrt())
    expected = ddim(scheduler, lambda v, t: net(v, t).sample, z, 400)
    assert float((prior.denoise(z, sigma) - expected).abs().max()) < 1e-5 * sigma * 4


# ---- what does not fit


@pytest.mark.parametrize(
    ("change", "got"),
    [
        ({"text": None, "pooled": None}, "nothing"),
        ({"pooled": None}, r"text \(2, 5, 16\)"),
        ({"prompt": torch.zeros(2)}, r"text .*, prompt \(2,\)"),
        ({"text": torch.zeros(2, 5, 17)}, r"text \(2, 5, 17\), pooled \(2, 12\)"),
        ({"text": torch.zeros(1, 5, 16)}, r"text \(1, 5, 16\), pooled \(2, 12\)"),
        ({"text": torch.zeros(2, 16)}, r"text \(2, 16\), pooled \(2, 12\)"),
        ({"sizes": torch.zeros(2, 5)}, r"text .*, sizes \(2, 5\)"),
    ],
)
def test_conditions_are_checked(diffusers: Any, change: dict[str, Tensor | None], got: str):
    net = as_network(sdxl_unet(diffusers))
    told = {"text": torch.zeros(2, 5, 16), "pooled": torch.zeros(2, 12)} | change
    told = {name: value for name, value in told.items() if value is not None}
    message = (
        r"UNet2DConditionModel is conditional on text \(B, n, 16\), pooled \(B, 12\), and may be told sizes "
        rf"\(B, 6\), with one row for each of the B = 2 samples; got {got}: pass condition=\{{'text'"
    )
    with pytest.raises(InputError, match=message):
        net(torch.zeros(2, *SHAPE), torch.zeros(2), **told)


def test_a_mask_is_as_long_as_its_text(diffusers: Any):
    net = pixart(diffusers)
    with pytest.raises(InputError, match=r"got text \(2, 5, 16\), text_mask \(2, 4\)"):
        as_network(net)(
            torch.zeros(2, 4, 8, 8), torch.zeros(2), text=torch.zeros(2, 5, 16), text_mask=torch.ones(2, 4)
        )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "UNet2DConditionModel",
            {"class_embed_type": "projection"},
            "with class_embed_type='proj",
        ),
        ("UNet2DConditionModel", {"num_class_embeds": 10}, "with num_class_embeds=10 cannot"),
        ("UNet2DConditionModel", {"addition_embed_type": "text"}, "addition_embed_type='text'"),
        ("UNet2DConditionModel", {"addition_embed_type": "image"}, "addition_embed_type='image'"),
        ("UNet2DConditionModel", {"encoder_hid_dim_type": "image_proj"}, "hid_dim_type='image_"),
        ("UNet2DConditionModel", {"time_cond_proj_dim": 256}, "with time_cond_proj_dim=256"),
        ("UNet2DConditionModel", {"in_channels": 9}, "in_channels=9 and returns out_channels=4"),
        ("UNet2DModel", {"class_embed_type": "timestep"}, "with class_embed_type='timestep'"),
        ("FluxTransformer2DModel", {"patch_size": 2}, "with patch_size=2"),
        ("FluxTransformer2DModel", {"in_channels": 384, "out_channels": 64}, "out_channels=64"),
    ],
)
def test_networks_of_other_conditions_are_refused(
    tmp_path: Path, name: str, change: dict[str, Any], message: str
):
    """By their configuration, before weights are fetched or read."""
    config = {"_class_name": name, "in_channels": 4, "out_channels": 4, "patch_size": None}
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=message):
        ig.load_prior(tmp_path)


def test_objects_are_refused_too(diffusers: Any):
    net = sdxl_unet(
        diffusers, addition_embed_type=None, class_embed_type="timestep", layers_per_block=1
    )
    with pytest.raises(InputError, match="with class_embed_type='timestep'"):
        ig.load_prior(net, predicts="eps", schedule="linear-vp", shape=(4, None, None))


def test_an_autoencoder_with_a_scale_per_channel(diffusers: Any, tmp_path: Path):
    """Playground v2.5: one factor would be another prior."""
    scheduler = sdxl_scheduler(diffusers, "epsilon")
    with pytest.raises(InputError, match="latents_mean, latents_std"):
        saved(
            tmp_path, sdxl_unet(diffusers), scheduler, "unet", latents_mean=[0.1] * 4, latents_std=[2.0] * 4
        )  # fmt: skip


def test_the_catalogue_names_them():
    lines = {entry.line for entry in PUBLIC}
    for name in (
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "stabilityai/stable-diffusion-xl-base-1.0",
        "stabilityai/stable-diffusion-3-medium-diffusers",
        "black-forest-labs/FLUX.1-schnell",
        "PixArt-alpha/PixArt-XL-2-512x512",
    ):
        assert f"ig.load_prior('{name}')" in lines
