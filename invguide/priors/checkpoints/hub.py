"""Models of the Hugging Face hub, by their own client."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from invguide.errors import InputError, InvguideError, require
from invguide.priors.checkpoints.diffusers_weights import STEMS, files_of

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

Fetch = Callable[
    ..., Path
]  # called with patterns of files; returns the folder that then holds them


@contextmanager
def fetching(repository: str) -> Iterator[Fetch]:
    """Give what fetches files of a repository; whatever goes wrong with it becomes one error.

    Raises:
        InputError: There is no such model, or none that can be had.
        MissingPackageError: The client is not installed.
    """
    hub = require(
        "huggingface_hub", f"downloading {repository!r}", install="'invguide[diffusers]'"
    )
    try:
        yield lambda *patterns: Path(
            hub.snapshot_download(repository, allow_patterns=list(patterns))
        )
    except InvguideError:
        raise
    except Exception as error:  # of the client and of the network, of many kinds
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise InputError(
            f"{repository!r} is no embedded prior, no file or folder here, and cannot be had from the Hugging "
            f"Face hub ({type(error).__name__}: {reason})"
        ) from error


def fetch_weights(
    fetch: Fetch, folder: Path, part: Path, stems: Mapping[str, str] = STEMS
) -> None:
    """Fetch the weights of one model of a repository: tensors, or pickles where there are no others.

    Args:
        fetch: Of `fetching`.
        folder: Of the repository, where all of its .json files are by now.
        part: Of the model, in that folder.
        stems: As for `weights_in`.
    """
    for suffix, stem in stems.items():
        index, whole = part / f"{stem}.{suffix}.index.json", part / f"{stem}.{suffix}"
        files = files_of(index if index.is_file() else whole)
        fetch("*.json", *(file.relative_to(folder).as_posix() for file in files))
        if files[0].is_file():
            return
