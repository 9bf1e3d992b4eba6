"""Text encoders and tokenizers of a pipeline of diffusers: tensors and tables are read, no code of the folder runs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from invguide.errors import CheckpointError, InvguideError, require
from invguide.priors.checkpoints.diffusers_weights import TEXT_STEMS, read_all, weights_in

ENCODER = re.compile("CLIPTextModel(WithProjection)?|T5EncoderModel")
TOKENIZER = re.compile("(CLIP|T5)Tokenizer(Fast)?")
SENTENCES = (
    "spiece.model"  # the table of T5 in PixArt's folders; newer ones have it as tokenizer.json too
)


def is_text_part(name: str) -> bool:
    """Whether a part of a pipeline is a text encoder or tokenizer, as text_encoder_2."""
    return name.startswith(("text_encoder", "tokenizer"))


def classes_of(folder: Path, index: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Return the class of transformers of each of these parts of a pipeline.

    Args:
        folder: Of the pipeline, for the message.
        index: Its model_index.json.
        names: Of text encoders and tokenizers.

    Raises:
        CheckpointError: A part is missing, or of a class that is not known here.
    """
    classes = {}
    for name in names:
        told, known = index.get(name), ENCODER if name.startswith("text") else TOKENIZER
        library, kind = told if isinstance(told, list) and len(told) == 2 else (None, None)
        if library != "transformers" or not known.fullmatch(str(kind)):
            raise CheckpointError(
                f"{folder} has no {name} that can embed a prompt (model_index.json says {told}; expected a class of "
                f"transformers, {known.pattern}): use the whole pipeline as it was published, or condition= instead"
            )
        classes[name] = str(kind)
    return classes


def load_parts(folder: Path, classes: Mapping[str, str]) -> dict[str, Any]:
    """Return the text encoders, in float32 on the CPU, and tokenizers of a pipeline, by their names.

    Raises:
        CheckpointError: One is missing, damaged, or does not fit its configuration or the other.
    """
    with _quiet():
        parts = {name: _load(folder / name, kind) for name, kind in classes.items()}
    for name in (name for name in parts if name.startswith("tokenizer")):
        encoder = parts[name.replace("tokenizer", "text_encoder")]
        words, expected = len(parts[name]), int(encoder.config.vocab_size)
        if (
            not expected / 2 <= words <= expected
        ):  # of no files, transformers makes one of a few words
            raise CheckpointError(
                f"{folder / name} knows {words} tokens and its text encoder {expected}: a file is missing or damaged; "
                "download or save the folder again"
            )
    return parts


def _load(place: Path, name: str) -> Any:
    kind = getattr(require("transformers", "embedding a prompt"), name)
    try:
        if ENCODER.fullmatch(name):
            return _encoder(place, kind)
        if (place / SENTENCES).is_file() and not (place / "tokenizer.json").is_file():
            for package in ("sentencepiece", "google.protobuf"):
                require(package, f"reading {place / SENTENCES}", install="sentencepiece protobuf")
        return kind.from_pretrained(place, local_files_only=True)
    except InvguideError:
        raise
    except Exception as error:  # whatever transformers makes of wrong files, of many kinds
        raise CheckpointError(
            f"{place} is refused by transformers as a {name} ({type(error).__name__}: {str(error)[:300]}); download or "
            "save the folder again"
        ) from error


def _encoder(place: Path, kind: Any) -> torch.nn.Module:
    config = kind.config_class.from_pretrained(place, local_files_only=True)
    config._attn_implementation = "eager"  # config.json could name one to be fetched and run
    file = weights_in(place, TEXT_STEMS)
    weights = read_all(file)
    with torch.device("meta"):
        size = sum(weight.numel() for weight in kind(config).parameters())
    there = sum(weight.numel() for weight in weights.values())
    if size > there:  # compared before memory is taken
        raise CheckpointError(
            f"{file} holds {there} numbers and {kind.__name__} has {size} by its config.json; no weight is ever left "
            "at random: download or save the folder again"
        )
    encoder, report = kind.from_pretrained(
        None,
        config=config,
        state_dict=weights,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,  # told in the report
        output_loading_info=True,
    )
    if wrong := {str(weight) for weights in report.values() for weight in weights}:
        raise CheckpointError(
            f"{file} does not fit {kind.__name__} ({len(wrong)} weights are missing, left over or of another shape, "
            f"such as {min(wrong)}); no weight is ever left at random: download or save the folder again"
        )
    return encoder.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars and reports of transformers, which would come before one clear error."""
    logging = require("transformers", "embedding a prompt").utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
