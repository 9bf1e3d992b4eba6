"""Denoising score matching on crops, resumable, with a learning rate that follows the time budget.

Loss: E || F(c_in x, c_noise) - (x0 - c_skip x) / c_out ||^2, x = x0 + sigma n, the EDM objective (arXiv 2206.00364,
eq. 8) with its own weight, so that every noise level contributes a target of unit variance.
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from invguide.priors.networks.preconditioning import edm_coefficients
from invguide.training.photos import Crops

VALIDATION_SIGMAS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides the weights besides the data and the clock."""

    minutes: float
    phases: tuple[tuple[float, int, int], ...] = (
        (0.4, 32, 96),
        (1.0, 64, 32),
    )  # until fraction, crop, batch
    learning_rate: float = 1.5e-3
    warmup_steps: int = 400
    decay_from: float = 0.35  # fraction of the budget after which the rate falls linearly to zero
    ema_decay: float = 0.999
    log_sigma_mean: float = -1.1
    log_sigma_std: float = 1.3
    wide_fraction: float = 0.1  # share of log-uniform levels, so that the extremes are seen at all
    sigma_range: tuple[float, float] = (0.005, 80.0)
    sigma_data: float = 0.5
    seed: int = 0


def draw_sigmas(rng: np.random.Generator, count: int, config: TrainingConfig) -> Tensor:
    """Stratified noise levels (count,): log-normal, a share of them log-uniform over the whole range."""
    uniform = torch.from_numpy((rng.permutation(count) + rng.random(count)) / count).float()
    low, high = (math.log(s) for s in config.sigma_range)
    log_normal = config.log_sigma_mean + config.log_sigma_std * torch.special.ndtri(
        uniform.clamp(1e-6, 1 - 1e-6)
    )
    wide = torch.from_numpy(rng.random(count)) < config.wide_fraction
    return torch.where(wide, low + (high - low) * uniform, log_normal).exp()


def denoising_loss(
    network: Callable[..., Tensor], x0: Tensor, sigma: Tensor, noise: Tensor, sigma_data: float
) -> Tensor:
    sigma = sigma[:, None, None, None]
    c = edm_coefficients(sigma, sigma_data)
    x = x0 + sigma * noise
    target = (x0 - c.skip * x) / c.out
    with torch.autocast(x.device.type, torch.bfloat16):
        output = network(c.input * x, c.noise.flatten())
    return (output.float() - target).square().mean()


@torch.no_grad()
def validate(
    network: nn.Module, images: Tensor, sigma_data: float, chunk: int = 50
) -> dict[str, float]:
    """Mean PSNR in dB (peak 2, images in [-1, 1]) of the denoised images at each validation level."""
    table = {}
    for sigma in VALIDATION_SIGMAS:
        generator = torch.Generator().manual_seed(1)
        psnr = []
        for x0 in images.split(chunk):
            x = x0 + sigma * torch.randn(x0.shape, generator=generator)
            c = edm_coefficients(torch.full((len(x0), 1, 1, 1), sigma), sigma_data)
            x, x0 = (
                x.to(next(network.parameters()).device),
                x0.to(next(network.parameters()).device),
            )
            c = type(c)(*(v.to(x.device) for v in c))
            denoised = (c.skip * x + c.out * network(c.input * x, c.noise.flatten())).clamp(-1, 1)
            psnr.append(-10 * ((denoised - x0).square().mean((1, 2, 3)) / 4).log10())
        table[str(sigma)] = round(torch.cat(psnr).mean().item(), 3)
    return table


# Longer than 60 lines: one training run from start to checkpoint.
def train(
    network: nn.Module,
    crops: Crops,
    validation: dict[str, Tensor],
    config: TrainingConfig,
    out: Path,
    *,
    device: str = "cpu",
    compile_network: bool = True,
    checkpoint_seconds: float = 300,
) -> dict[str, Any]:
    """Train `network` in place until the budget is spent; resume from `out/checkpoint.pt` when it is there.

    Writes `weights.safetensors` (moving average, float16) and `validation.json` beside the checkpoint at every
    checkpoint, so that an interrupted run already leaves a usable prior. Returns the validation record.
    """
    out.mkdir(parents=True, exist_ok=True)
    network = network.to(device).to(memory_format=torch.channels_last)
    average = copy.deepcopy(network).eval()
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    step, seconds, images_seen = 0, 0.0, 0
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        network.load_state_dict(saved["network"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        step, seconds, images_seen = saved["step"], saved["seconds"], saved["images_seen"]
    forward = torch.compile(network) if compile_network else network
    budget = 60 * config.minutes
    record: dict[str, Any] = {}

    def save() -> None:
        record.update(
            network=getattr(network, "config", {}),
            training=asdict(config),
            step=step,
            minutes=round(seconds / 60, 2),
            images_seen=images_seen,
            validation_psnr={
                k: validate(average, v, config.sigma_data) for k, v in validation.items()
            },
        )
        state = {
            "network": network.state_dict(),
            "average": average.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "seconds": seconds,
            "images_seen": images_seen,
        }
        torch.save(state, checkpoint.with_suffix(".tmp"))
        os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
        weights = {k: v.half().contiguous() for k, v in average.state_dict().items()}
        metadata = {"network": json.dumps(record["network"]), "sigma_data": str(config.sigma_data)}
        save_file(weights, out / "weights.tmp", metadata=metadata)
        os.replace(out / "weights.tmp", out / "weights.safetensors")
        (out / "validation.json").write_text(json.dumps(record, indent=2) + "\n")

    bar = tqdm(total=round(budget), initial=round(seconds), unit="s", desc="training")
    last_save, tick, running = seconds, time.monotonic(), float("nan")
    while seconds < budget:
        progress = seconds / budget
        _, size, batch = next(phase for phase in config.phases if progress < phase[0])
        rng = np.random.Generator(np.random.Philox(key=[config.seed, step]))
        x0 = crops.batch(rng, batch, size).to(device, memory_format=torch.channels_last)
        noise = torch.from_numpy(rng.standard_normal(x0.shape, np.float32)).to(device)
        sigma = draw_sigmas(rng, batch, config).to(device)
        decay = (1 - progress) / (1 - config.decay_from)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1.0, (step + 1) / config.warmup_steps, decay)
        loss = denoising_loss(forward, x0, sigma, noise, config.sigma_data)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, images_seen = step + 1, images_seen + batch
        with torch.no_grad():
            rate = 1 - min(config.ema_decay, (1 + step) / (10 + step))
            for mine, new in zip(average.parameters(), network.parameters(), strict=True):
                mine.lerp_(new, rate)
        if step % 20 == 0:
            value = loss.item()
            if not math.isfinite(value):
                raise RuntimeError(
                    f"the loss became {value} at step {step}; lower learning_rate and resume"
                )
            running = value if math.isnan(running) else 0.95 * running + 0.05 * value
            bar.set_postfix(step=step, loss=f"{running:.4f}", refresh=False)
        now = time.monotonic()
        bar.update(round(seconds + now - tick) - round(seconds))
        seconds, tick = seconds + now - tick, now
        if seconds - last_save > checkpoint_seconds:
            save()
            last_save, tick = seconds, time.monotonic()
    bar.close()
    save()
    return record
