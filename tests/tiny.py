"""What several test files share: commands run in this process, and a tiny model like Stable Diffusion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from typer.testing import CliRunner

from invguide.cli import app

TEXT = 16  # numbers of an embedded token


def run(*arguments: object, code: int = 0) -> str:
    """Run a command of `invguide`, and return what it printed, errors last."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result.stdout + result.stderr


def randomised(net: Any) -> Any:
    """No weight left at zero, as output layers are before the training."""
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, 0.0, 0.05)
    return net.eval()


def stable_diffusion(diffusers: Any, folder: Path) -> Path:
    """Save a network that is told text, an autoencoder of 4 pixels to a latent, and a scheduler; x0 is predicted."""
    network = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT,
        attention_head_dim=8,
        norm_num_groups=4,
    )
    autoencoder = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
    )
    randomised(network).save_pretrained(folder / "unet")
    randomised(autoencoder).save_pretrained(folder / "vae")
    scheduler = {"beta_schedule": "scaled_linear", "prediction_type": "sample"}
    diffusers.DDIMScheduler(**scheduler).save_pretrained(folder / "scheduler")
    return folder
