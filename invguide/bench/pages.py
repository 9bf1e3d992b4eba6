"""Pages of measurements: Markdown files that keep a table with the command that printed it, the day and the machine."""

from __future__ import annotations

import os
import platform
import re
from datetime import date
from pathlib import Path

from invguide.errors import InputError
from invguide.system.run_file import try_to_write, write_whole

SECTION = re.compile(r"^## ", re.MULTILINE)


def machine() -> str:
    """Return the machine in words, without its name: cores, vectors, GPU, threads, versions."""
    import torch

    import invguide

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    vectors = torch.backends.cpu.get_cpu_capability()
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    gpu = "GPU " + ", ".join(names) if names else "no GPU"
    return (
        f"{cores} {platform.machine()} cores (vectors: {vectors}), {torch.get_num_threads()} used by torch, {gpu}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, invguide {invguide.__version__}"
    )


def check_page(path: Path, title: str) -> None:
    """Find out before a long bench whether its page can be written.

    Args:
        path: Of the page, which may not exist yet.
        title: Its first line, without the sign.

    Raises:
        InputError: The file is something else than this page.
        OSError: It cannot be written.
    """
    if path.is_file():
        first = path.read_text("utf-8", errors="replace").partition("\n")[0]
        if first != f"# {title}":
            raise InputError(
                f"--page {path} begins with {first[:80]!r}; expected '# {title}', the page of this bench, or a new file"
            )
    try_to_write(path, b"")


def write_page(path: Path, title: str, about: str, command: str, table: str) -> None:
    """Write the section of a command to a page: in place of its older one, or below the others.

    What stands in other sections, those written by hand too, is kept.

    Args:
        path: Of the page, made where it does not exist.
        title: Heading of the page.
        about: What is measured and why; stands below the heading.
        command: With its arguments; heading of the section.
        table: Markdown.

    Raises:
        OSError: It cannot be written.
    """
    old = path.read_text("utf-8") if path.is_file() else ""
    sections = SECTION.split(old)[1:]
    heading = f"`{command}`"
    section = (
        f"{heading}\n\nMeasured {date.today().isoformat()} on {machine()}.\n\n{table.strip()}\n"
    )
    kept = [s for s in sections if s.partition("\n")[0] != heading]
    place = next((i for i, s in enumerate(sections) if s.partition("\n")[0] == heading), len(kept))
    kept.insert(place, section)
    parts = [f"# {title}\n\n{about.strip()}\n", *(f"## {s.strip()}\n" for s in kept)]
    write_whole(path, "\n".join(parts).encode())
