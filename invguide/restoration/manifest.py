"""The folder of a restoration: its manifest, which marks it as done, and what an earlier run left there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from invguide.errors import InputError
from invguide.result import strict_json
from invguide.system.run_file import write_whole

CHECKPOINT = "checkpoint.pt"


MANIFEST = "manifest.json"


ARRAYS = ("samples", "mean", "std", "chi2")


def check_writable(folder: Path) -> None:
    """Make the folder; raise InputError unless files can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".invguide-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"output folder {folder} cannot be written to: {error.strerror}; use another --out"
        ) from error


WAYS = "use the same settings, or another --out"  # to go on after a refusal


def finished_settings(out: Path) -> dict[str, Any] | None:
    """Return the settings of the finished run in a folder, or None."""
    try:
        return json.loads((out / MANIFEST).read_text("utf-8"))["restore"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def compare_settings(there: dict[str, Any], here: dict[str, Any], names: list[str]) -> str:
    """Return in words how two runs differ in the settings of these names."""

    def show(value: Any) -> str:
        return str(value)[:60]

    if "sha256" in names:
        old, new = there.get("sha256", {}), here["sha256"]
        files = [k for k in {**old, **new} if old.get(k) != new.get(k)]
        names = [n for n in names if n != "sha256"]
        changed = [f"another {' and '.join(files)} file"]
    else:
        changed = []
    return ", ".join(
        [f"{n}: {show(there.get(n))} there, {show(here[n])} here" for n in names] + changed
    )


def remove_old(out: Path) -> None:
    """Take away an earlier run: its marker first, then pictures that this one may not overwrite, as restored-4.png."""
    for pattern in (
        MANIFEST,
        "restored*.png",
        "restored*.tiff",
        "mean.*",
        "std.*",
        "panel.png",
        "*.npy",
    ):
        for file in out.glob(pattern):
            if not file.name.endswith(".npy") or file.stem in ARRAYS:
                file.unlink()


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Write strict JSON (no NaN) in one go."""
    write_whole(path, f"{strict_json(manifest)}\n".encode(), lasting=False)
