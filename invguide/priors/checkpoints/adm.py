"""Checkpoints of OpenAI's guided-diffusion and of its many descendants, from the file alone where that can be."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invguide.errors import CheckpointError, InputError, suggest
from invguide.priors.checkpoints.file import load_strictly
from invguide.priors.network import NetworkPrior, from_network
from invguide.priors.networks.adm import ADM, Architecture, QKVOrder


@dataclass(frozen=True)
class Preset:
    """A published checkpoint: its architecture, and what its file does not tell.

    Attributes:
        files: Names, without suffix, under which it is published.
        size: Height and width of the images that it was trained on.
    """

    name: str
    description: str
    files: tuple[str, ...]
    size: int
    architecture: Architecture
    num_heads: int | None = None
    num_head_channels: int | None = 64
    qkv_order: QKVOrder = "legacy"
    schedule: str = "linear-vp"


def _architecture(
    width: int, factors: tuple[float, ...], attention: int, num_res_blocks: int = 2
) -> Architecture:
    """ADM with attention on the levels of this bit mask, written from the coarsest to the finest."""
    return Architecture(
        image_channels=3,
        output_channels=6,
        model_channels=width,
        channels=tuple(int(width * factor) for factor in factors),
        attention=tuple(bool(attention >> level & 1) for level in range(len(factors))),
        num_res_blocks=num_res_blocks,
    )


_IMAGENET_256 = _architecture(256, (1, 1, 2, 2, 4, 4), 0b111000)
_IMAGENET_512 = _architecture(256, (0.5, 1, 1, 2, 2, 4, 4), 0b1110000)


def _conditional(architecture: Architecture) -> Architecture:
    return replace(architecture, num_classes=1000)


PRESETS = {
    p.name: p
    for p in (
        Preset(
            "ffhq-256",
            "faces of the DPS paper (also ILVR and P2 networks of this size)",
            ("ffhq_10m", "diffusion_ffhq_10m"),
            256,
            _architecture(128, (1, 1, 2, 2, 4, 4), 0b010000, num_res_blocks=1),
        ),
        Preset(
            "imagenet-256",
            "unconditional ImageNet; the LSUN networks have the same settings",
            (
                *("256x256_diffusion_uncond", "imagenet256", "diffusion_openai"),
                *("lsun_bedroom", "lsun_cat", "lsun_horse", "lsun_horse_nodropout"),
            ),
            256,
            _IMAGENET_256,
        ),
        Preset(
            "imagenet-64-cond",
            "ImageNet by class",
            ("64x64_diffusion",),
            64,
            _conditional(_architecture(192, (1, 2, 3, 4), 0b1110, num_res_blocks=3)),
            qkv_order="new",
            schedule="cosine-vp",
        ),
        Preset(
            "imagenet-128-cond",
            "ImageNet by class",
            ("128x128_diffusion",),
            128,
            _conditional(_architecture(256, (1, 1, 2, 3, 4), 0b11100)),
            num_heads=4,
            num_head_channels=None,
        ),
        Preset(
            "imagenet-256-cond",
            "ImageNet by class",
            ("256x256_diffusion",),
            256,
            _conditional(_IMAGENET_256),
        ),
        Preset(
            "imagenet-512-cond",
            "ImageNet by class",
            ("512x512_diffusion",),
            512,
            _conditional(_IMAGENET_512),
        ),
    )
}


def is_adm(weights: Mapping[str, Tensor]) -> bool:
    return {
        "time_embed.0.weight",
        "input_blocks.0.0.weight",
        "out.2.weight",
    } <= weights.keys() and any(name.startswith("output_blocks.") for name in weights)


def infer_architecture(weights: Mapping[str, Tensor], source: str | Path) -> Architecture:
    """Read the architecture off the names and shapes.

    Raises:
        CheckpointError: They are not those of an ADM network.
    """
    try:
        down = _number_of_blocks(weights, "input_blocks")
        up = _number_of_blocks(weights, "output_blocks")
        # A level of the way up ends in a second residual block, or in an upsampling convolution.
        by_blocks = _number_of_matches(weights, r"output_blocks\.\d+\.[12]\.in_layers\.0\.weight")
        by_convolutions = _number_of_matches(weights, r"output_blocks\.\d+\.[12]\.conv\.weight")
        levels = 1 + by_blocks + by_convolutions
        per_level = up // levels
        if down != up or up % levels or per_level < 2 or (by_blocks and by_convolutions):
            raise ValueError(f"{down} blocks down, {up} up, {levels} levels")
        firsts = [1 + level * per_level for level in range(levels)]
        channels = [weights[f"input_blocks.{k}.0.out_layers.3.weight"].shape[0] for k in firsts]
        labels = weights.get("label_emb.weight")
        return Architecture(
            image_channels=weights["input_blocks.0.0.weight"].shape[1],
            output_channels=weights["out.2.weight"].shape[0],
            model_channels=weights["time_embed.0.weight"].shape[1],
            channels=tuple(channels),
            attention=tuple(f"input_blocks.{k}.1.qkv.weight" in weights for k in firsts),
            num_res_blocks=per_level - 1,
            num_classes=None if labels is None else labels.shape[0],
            scale_shift_norm=weights["input_blocks.1.0.emb_layers.1.weight"].shape[0]
            == 2 * channels[0],
            resblock_updown=by_convolutions == 0,
        )
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(
            f"{source} has the names of a guided-diffusion network but not its structure ({error}); "
            "build the network yourself and pass it: load_prior(net, weights=file, predicts=..., schedule=...)"
        ) from error


def _number_of_blocks(weights: Mapping[str, Tensor], part: str) -> int:
    """Blocks are numbered from 0 without gaps; counting names cannot be made to run away by a big number."""
    numbers = {int(k.split(".")[1]) for k in weights if k.startswith(f"{part}.")}
    if numbers != set(range(len(numbers))):
        raise ValueError(f"{part} are not numbered from 0 to {len(numbers) - 1}")
    return len(numbers)


def _number_of_matches(weights: Mapping[str, Tensor], pattern: str) -> int:
    return sum(re.fullmatch(pattern, name) is not None for name in weights)


def load_adm(
    weights: Mapping[str, Tensor],
    source: str | Path,
    *,
    preset: str | None = None,
    num_heads: int | None = None,
    num_head_channels: int | None = None,
    qkv_order: QKVOrder | None = None,
    shape: tuple[int | None, ...] | None = None,
    schedule: str | Tensor | None = None,
    predicts: str = "eps",
    **settings: Any,
) -> NetworkPrior:
    """Return the prior of an ADM state dict.

    The number of heads, the order of queries, keys and values, and the noise schedule cannot be seen in
    the file: the wrong ones load without complaint and give a wrong network. They come from a preset,
    from the name under which a well-known file is published, or from the arguments.

    Args:
        weights, source: The state dict and the file that it is from.
        preset: A name of `PRESETS`.
        num_heads, num_head_channels, qkv_order: As for `ADM`, in place of a preset.
        shape: Of one sample; by default the size that a preset was trained on, else any size.
        schedule, predicts, settings: As for `from_network`; the schedule is that of the preset, or "linear-vp".

    Raises:
        InputError: The file alone does not tell enough, or preset and arguments are mixed.
        CheckpointError: The file does not fit the preset, or any ADM network.
    """
    architecture = infer_architecture(weights, source)
    told = (num_heads, num_head_channels, qkv_order) != (None, None, None)
    if preset is not None and told:
        raise InputError(
            "preset= already says num_heads, num_head_channels and qkv_order: give one or the other"
        )
    known = _named(preset) if preset is not None else None if told else _published(source)
    if known is not None:
        _check_preset(known, architecture, source)
        num_heads, num_head_channels, qkv_order = (
            known.num_heads,
            known.num_head_channels,
            known.qkv_order,
        )
        shape = shape or (architecture.image_channels, known.size, known.size)
        schedule = known.schedule if schedule is None else schedule
    elif qkv_order is None or (num_heads is None) == (num_head_channels is None):
        raise InputError(_what_to_pass(architecture, source))
    with torch.device("meta"):  # shapes are compared before memory is taken
        net = ADM(
            architecture,
            num_heads=num_heads,
            num_head_channels=num_head_channels,
            qkv_order=qkv_order,
        )
    load_strictly(net, weights, source)
    return from_network(
        net,
        predicts,
        "linear-vp" if schedule is None else schedule,
        shape or (architecture.image_channels, None, None),
        **{"multiple": architecture.multiple, **settings},
    )


def _named(preset: str) -> Preset:
    if preset not in PRESETS:
        raise InputError(f"unknown preset {preset!r}; {suggest(preset, PRESETS)}")
    return PRESETS[preset]


def _published(source: str | Path) -> Preset | None:
    """The preset of a file that still has the name under which it is published."""
    stem = Path(source).stem
    return next((p for p in PRESETS.values() if stem in p.files), None)


def _check_preset(preset: Preset, found: Architecture, source: str | Path) -> None:
    expected = preset.architecture
    different = [
        f"{f.name} {getattr(found, f.name)}, not {getattr(expected, f.name)}"
        for f in fields(Architecture)
        if getattr(found, f.name) != getattr(expected, f.name)
    ]
    if different:
        raise CheckpointError(
            f"{source} is not the network of preset {preset.name!r}: it has {'; '.join(different)}. Pass "
            "num_heads= or num_head_channels=, and qkv_order='legacy' or 'new', as in its training settings"
        )


def _what_to_pass(architecture: Architecture, source: str | Path) -> str:
    like = [p.name for p in PRESETS.values() if p.architecture == architecture]
    hint = f"If it is one of those, pass preset={like[0]!r}. " if like else ""
    same = f" of the size of preset {like[0]!r}" if like else ""
    return (
        f"{source} is a guided-diffusion network{same}, and the file does not tell its attention heads nor the "
        f"order of queries, keys and values. {hint}Otherwise pass num_head_channels= (such as 64) or num_heads=, "
        "and qkv_order='legacy' (use_new_attention_order=False, the default of guided-diffusion) or 'new'; and "
        "schedule='cosine-vp' if that is not linear"
    )
