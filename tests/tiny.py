"""What several test files share: commands run in this process, and tiny random networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from typer.testing import CliRunner

from invguide.cli.terminal import app


def run(*arguments: object, code: int = 0) -> str:
    """Run a command of `invguide`, and return what it printed, errors last."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result.stdout + result.stderr


def filled(net: Any, spread: float = 0.2) -> Any:
    """No weight left at zero, as output layers are before the training."""
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, 0.0, spread)
    return net.eval().requires_grad_(False)


def randomised(net: Any) -> Any:
    """No weight left near zero, nor biases and norms at their usual values."""
    for p in net.parameters():
        if p.ndim < 2:
            nn.init.normal_(p, 0.5, 0.1)
        elif p.std() < 1e-3:
            nn.init.normal_(p, 0.0, p[0].numel() ** -0.5)
    return net.eval().requires_grad_(False)


# ---- models of diffusers, as they are built; `changed` are settings


def text_unet(diffusers: Any, **changed: Any) -> Any:
    """The network of Stable Diffusion: told tokens of 16 numbers."""
    settings = {
        "sample_size": 8,
        "block_out_channels": (8, 8),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 8,
        "norm_num_groups": 4,
    }
    return diffusers.UNet2DConditionModel(**(settings | changed))


def autoencoder(diffusers: Any, channels: int = 8, levels: int = 3, **changed: Any) -> Any:
    """2 ** (levels - 1) pixels to a latent of 4 numbers."""
    settings = {
        "block_out_channels": (channels,) * levels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "latent_channels": 4,
        "norm_num_groups": 4,
    }
    return diffusers.AutoencoderKL(**(settings | changed))


def sd3(diffusers: Any, size: int = 8) -> Any:
    """The transformer of Stable Diffusion 3: told tokens of 16 numbers, and 12 numbers of the whole text."""
    return diffusers.SD3Transformer2DModel(
        sample_size=size,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        pos_embed_max_size=size,
    )


def dit(diffusers: Any, **changed: Any) -> Any:
    """A transformer that is told one of 5 classes; noise and variance in one output."""
    settings = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "sample_size": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": 5,
    }
    return diffusers.DiTTransformer2DModel(**(settings | changed))


def stable_diffusion(diffusers: Any, folder: Path) -> Path:
    """Save a network that is told text, an autoencoder of 4 pixels to a latent, and a scheduler; x0 is predicted."""
    filled(text_unet(diffusers), 0.05).save_pretrained(folder / "unet")
    filled(autoencoder(diffusers), 0.05).save_pretrained(folder / "vae")
    scheduler = {"beta_schedule": "scaled_linear", "prediction_type": "sample"}
    diffusers.DDIMScheduler(**scheduler).save_pretrained(folder / "scheduler")
    return folder
