"""Restore one picture into one file."""

from __future__ import annotations

import shutil
from pathlib import Path

from invguide.images.export import export
from invguide.images.reading import read_picture
from invguide.restoration.manifest import check_writable
from invguide.restoration.restore import restore_picture
from invguide.restoration.settings import Job


def restore_file(job: Job, source: Path, out: Path, *, resume: bool) -> None:
    """Restore a picture into a file of the format that its name asks for; an interrupted run leaves a folder behind.

    Raises:
        InputError: Nothing can be written there.
        RunError: Diverged, interrupted, or out of memory.
    """
    check_writable(out.parent)
    place = out.with_name(f".{out.name}.invguide")
    restore_picture(job, source, place, resume=resume)
    (restored,) = place.glob("restored.*")
    export(restored, out, read_picture(source, holes=True))
    shutil.rmtree(place)
