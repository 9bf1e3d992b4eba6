"""Restore every picture of a folder, each into a folder of its own; what is done is skipped."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from invguide.errors import CheckpointError, InputError, InvguideError, RunError
from invguide.images.picture_files import readable
from invguide.restoration.manifest import WAYS, check_writable, compare_settings, finished_settings
from invguide.restoration.restore import restore_picture
from invguide.restoration.settings import Job


@dataclass(frozen=True)
class Outcome:
    """How one picture of a folder fared: "restored", "done already", or what went wrong."""

    name: str
    outcome: str
    chi2: float | None = None
    seconds: float | None = None

    @property
    def failed(self) -> bool:
        return self.outcome not in ("restored", "done already")


def list_pictures(folder: Path) -> list[Path]:
    """Return the pictures of a folder by their suffixes, sorted; what else is in it is left out, and named.

    Hidden files are left out in silence.

    Raises:
        InputError: There is none.
    """
    suffixes = readable()
    files = sorted(f for f in folder.iterdir() if not f.name.startswith("."))
    found = [f for f in files if f.suffix.lower() in suffixes and f.is_file()]
    others = [f"{f.name}/" if f.is_dir() else f.name for f in files if f not in found]
    if not found:
        inside = f"; it holds {', '.join(others[:5])}" if others else ""
        raise InputError(
            f"folder {folder} has no pictures ({', '.join(s[1:] for s in suffixes)}){inside}"
        )
    if others:
        why = ": folders inside are not entered" if any(o.endswith("/") for o in others) else ""
        warnings.warn(f"folder {folder}: left out {', '.join(others)}{why}")
    return found


def plan_folder(job: Job, folder: Path, out: Path, overwrite: bool) -> dict[Path, Path]:
    """Return each picture of a folder and the sub-folder of `out` that it is restored into.

    Raises:
        CheckpointError: A picture was finished under other settings, and overwrite is off.
    """
    pictures = list_pictures(folder)
    job.pictures = len(pictures)
    check_writable(out)
    stems = [p.stem for p in pictures]
    places = {p: out / (p.stem if stems.count(p.stem) == 1 else p.name) for p in pictures}
    if not overwrite:
        for path, place in places.items():
            there, here = finished_settings(place), job.identity(path)
            different = [] if there is None else [k for k in here if there.get(k) != here[k]]
            if different and there is not None:
                raise CheckpointError(
                    f"{place} holds a run with other settings ({compare_settings(there, here, different)}); "
                    f"{WAYS}, or --overwrite"
                )
    return places


def restore_folder(job: Job, folder: Path, out: Path, *, overwrite: bool = False) -> list[Outcome]:
    """Restore every picture of a folder into a sub-folder of its own; what is done is skipped, failures do not stop it.

    Raises:
        CheckpointError: A picture was finished under other settings, and overwrite is off.
    """
    rows = []
    places = plan_folder(job, folder, out, overwrite)
    for i, (path, place) in enumerate(places.items(), 1):
        job.say(f"[{i} of {len(places)}]")
        rows.append(restore_guarded(job, path, place, overwrite))
    return rows


def restore_guarded(job: Job, path: Path, place: Path, overwrite: bool) -> Outcome:
    """Restore one picture of a folder; what goes wrong with it is the outcome."""
    try:
        result = restore_picture(job, path, place, resume=not overwrite)
    except RunError as error:
        if str(error).startswith("interrupted"):
            raise
        job.say(f"{path}: failed: {error}")
        return Outcome(path.name, str(error))
    except (InvguideError, OSError, RuntimeError, ValueError) as error:
        job.say(f"{path}: failed: {error}")
        return Outcome(path.name, str(error).splitlines()[0])
    if result is None:
        return Outcome(path.name, "done already")
    chi2 = result.chi2[torch.isfinite(result.chi2)]
    return Outcome(
        path.name, "restored", float(chi2.mean()) if len(chi2) else None, result.seconds
    )
