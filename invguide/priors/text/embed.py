"""A prompt as the conditions of a text-conditional prior, by the text encoders that lie beside its network."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invguide.arguments.checks import checked
from invguide.errors import CheckpointError, InputError, require
from invguide.priors.checkpoints.diffusers_weights import (
    TEXT_STEMS,
    files_of,
    read_json,
    weights_in,
)
from invguide.priors.checkpoints.hub import HUB_ID, fetch_weights, fetching
from invguide.priors.text.encoders import ENCODER, TOKENIZER, classes_of, is_text_part, load_parts
from invguide.system.devices import resolve_device

# Pipelines of diffusers, and where in what their encode_prompt returns each of our conditions stands.
RETURNS = {
    "StableDiffusionPipeline": {"text": 0},
    "StableDiffusionXLPipeline": {"text": 0, "pooled": 2},
    "StableDiffusion3Pipeline": {"text": 0, "pooled": 2},
    "FluxPipeline": {"text": 0, "pooled": 1},
    "PixArtAlphaPipeline": {"text": 0, "text_mask": 1},
    "PixArtSigmaPipeline": {"text": 0, "text_mask": 1},
}
NAMES = frozenset(name for places in RETURNS.values() for name in places)


@checked
def embed_text(
    where: str | Path, prompt: str | Sequence[str], *, device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """Return what a text-conditional prior is told: `solve(..., condition=embed_text(where, "a cat"))`.

    Tokens, padding, layers and pooling are those of the model's pipeline in diffusers, without classifier-free
    guidance. No code of the folder runs; pickles are read as tensors only.

    Args:
        where: The folder of a pipeline saved by diffusers, or its hub id: what `load_prior` takes.
        prompt: A text, or several; "" is what the network was told where there was no text.
        device: Where the text encoders work; they are in memory only meanwhile. Default "cpu"; "cuda" for long lists.

    Returns:
        By the names that the prior takes, one row for each text, float32, on the CPU.

    Raises:
        InputError: The model takes no text, or is of a pipeline that is not known here.
        CheckpointError: A text encoder or tokenizer is missing, damaged, or does not fit.
        MissingPackageError: diffusers or transformers is not installed.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts or not all(isinstance(text, str) for text in prompts):
        raise InputError(f"prompt is {prompt!r}; expected a text, or a list of texts")
    target = resolve_device(device)
    folder, kind, classes = _open(where)
    parts = load_parts(folder, classes)
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.to(target)
    asked = inspect.signature(kind).parameters
    heavy = {n: None for n, p in asked.items() if p.default is p.empty}  # left out
    unsafe = {"requires_safety_checker": False} if "requires_safety_checker" in asked else {}
    pipeline = kind(**heavy | parts, **unsafe)
    settings: dict[str, Any] = {
        "prompt_2": None,  # the same for every encoder
        "prompt_3": None,
        "device": target,
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": False,
    }
    takes = inspect.signature(pipeline.encode_prompt).parameters
    with torch.no_grad():
        rows = pipeline.encode_prompt(prompts, **{n: v for n, v in settings.items() if n in takes})
    places = RETURNS[kind.__name__]
    embedded = {name: rows[place].float().cpu() for name, place in places.items()}
    if not all(bool(value.isfinite().all()) for value in embedded.values()):
        raise CheckpointError(
            f"the text encoders of {folder} return NaN or infinity: they are damaged; use others"
        )
    return embedded


def text_files(where: str | Path) -> tuple[Path, ...]:
    """Return every file of weights that `embed_text` reads."""
    folder, _, classes = _open(where)
    places = (folder / part for part, name in classes.items() if ENCODER.fullmatch(name))
    return tuple(file for place in places for file in files_of(weights_in(place, TEXT_STEMS)))


def _open(where: str | Path) -> tuple[Path, Any, dict[str, str]]:
    """Return a pipeline's folder, fetched where it is on the hub, its class, and those of its parts for text."""
    if Path(where).exists() or not HUB_ID.fullmatch(str(where)):
        return _described(Path(where))
    with fetching(str(where)) as fetch:
        folder, kind, classes = _described(fetch("*.json"))
        for part, name in classes.items():
            if TOKENIZER.fullmatch(name):
                fetch("*.json", f"{part}/*")
            else:
                fetch_weights(fetch, folder, folder / part, TEXT_STEMS)
        return folder, kind, classes


def _described(folder: Path) -> tuple[Path, Any, dict[str, str]]:
    known = f"prompts are embedded for {', '.join(RETURNS)}"
    if not (folder / "model_index.json").is_file():
        raise InputError(
            f"{folder} has no model_index.json; expected the folder or hub id of a whole pipeline of diffusers, with "
            f"its text encoders ({known}): leave the prompt out, or pass condition= instead"
        )
    index = read_json(folder / "model_index.json")
    name = index.get("_class_name")
    if name not in RETURNS:
        raise InputError(
            f"{folder} holds a {name}, which takes no text, or in a way that is not known here; {known}: leave the "
            "prompt out, or pass condition= instead"
        )
    require("transformers", "embedding a prompt", install="'invguide[diffusers]'")
    diffusers = require("diffusers", "embedding a prompt", install="'invguide[diffusers]'")
    kind = getattr(diffusers, name)
    parts = filter(is_text_part, inspect.signature(kind).parameters)
    return folder, kind, classes_of(folder, index, parts)
