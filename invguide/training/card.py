"""The model card that ships beside a weights file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

TEMPLATE = """# {name}

A denoiser of colour photographs for every noise level, used as the prior `invguide.load_prior("{name}")`.

- **Network**: U-Net on pixel-unshuffled input, channels {channels}, {blocks} residual blocks per resolution,
  no attention, per-pixel RMS normalisation; {parameters:,} parameters; EDM preconditioning, sigma_data {sigma_data}.
- **Data**: {data}
- **Made by**: `{command}`, seed {seed}; {step:,} steps, {images_seen:,} crops, {minutes:.0f} minutes on {hardware}.
- **File**: `{file}`, float16 moving average, {size:,} bytes, sha256 `{sha256}`.
- **Made for**: restoration of photographs (texture, edges, colour). It has seen small crops only: it knows no
  objects, and free samples are texture without content.

Validation: mean PSNR in dB of denoised 64 x 64 photographs, images in [-1, 1] (peak 2), sigma in the same units.

| sigma | {sigmas} |
| --- |{rule}
{rows}
"""

CALTECH = (
    "Caltech-101 (F.-F. Li, M. Andreeto, M. Ranzato, P. Perona; doi 10.22002/D1.20086; CC BY 4.0), 4,165 of its "
    "colour photographs in 77 categories, short side reduced to 96 pixels, mirrored at random, at scales 1, "
    "0.75 and 0.5; one in 50 held out."
)

ROWS = {
    "held-out": "held-out Caltech-101 photographs",
    "evaluate": "40 test photographs (Kodak and others), never trained on",
}


def model_card(
    name: str,
    record: dict[str, Any],
    weights: Path,
    *,
    command: str,
    hardware: str,
    data: str = CALTECH,
) -> str:
    """Return the card of a weights file as Markdown; `record` is the trainer's validation.json."""
    from invguide.priors.checkpoints.embedded import read_unet

    network, sigma_data = read_unet(weights)
    tables = record["validation_psnr"]
    sigmas = list(next(iter(tables.values())))
    content = weights.read_bytes()
    return TEMPLATE.format(
        name=name,
        channels=tuple(record["network"]["channels"]),
        blocks=record["network"]["blocks"],
        parameters=sum(p.numel() for p in network.parameters()),
        sigma_data=sigma_data,
        data=data,
        command=command,
        seed=record["training"]["seed"],
        step=record["step"],
        images_seen=record["images_seen"],
        minutes=record["minutes"],
        hardware=hardware,
        file=weights.name,
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        sigmas=" | ".join(sigmas),
        rule=" --- |" * len(sigmas),
        rows="\n".join(
            f"| {ROWS.get(key, key)} | " + " | ".join(f"{row[s]:.2f}" for s in sigmas) + " |"
            for key, row in tables.items()
        ),
    )
