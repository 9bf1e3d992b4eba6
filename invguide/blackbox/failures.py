"""The report of failed calls: a table, and the line that replays one."""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from invguide.blackbox import work
from invguide.blackbox.command import Command, write
from invguide.blackbox.ledger import Member
from invguide.blackbox.workers import by_value
from invguide.system.tables import markdown

LISTED = 8
WIDTH = 160


def report(
    function: Callable[[Any], Any],
    kind: list[str],
    members: Sequence[Member],
    inputs: Sequence[np.ndarray],
    cache: Path | None,
) -> str:
    """Return the first failures as a table and the line that replays the first; their inputs are saved as .npy.

    Args:
        function: What was called.
        kind: What it takes, as for `work.run`.
        members: Of the batch.
        inputs: What each was called with.
        cache: Folder for the inputs; a temporary one where there is none.
    """
    failed = [i for i, member in enumerate(members) if member.failed]
    folder = (
        Path(tempfile.mkdtemp(prefix="invguide-failed-")) if cache is None else cache / "failed"
    )
    folder.mkdir(parents=True, exist_ok=True)
    rows, paths = [], []
    for i in failed[:LISTED]:
        path = folder / f"sample-{i}.npy"
        np.save(path, inputs[i], allow_pickle=False)
        paths.append(path)
        detail = " ".join(members[i].detail.split()).replace("|", "/")
        detail = (
            detail
            if len(detail) <= WIDTH
            else f"{detail[: WIDTH // 2]} ... {detail[-WIDTH // 2 :]}"
        )
        rows.append((str(i), members[i].state, str(members[i].attempts), detail))
    table = markdown(("sample", "state", "attempts", "what happened"), rows, left=(1, 3))
    more = f"\nand {len(failed) - LISTED} more" if len(failed) > LISTED else ""
    line = replay(function, kind, inputs[failed[0]], paths[0])
    return f"{table}{more}\ninputs: {folder}\nreplay sample {failed[0]}: {line}"


def replay(function: Callable[[Any], Any], kind: list[str], x: np.ndarray, path: Path) -> str:
    """The shell command that calls the function again on one saved input, or the Python line where it cannot travel."""
    if isinstance(function, Command):
        source = path.with_suffix(f".{function.input_format or function.format}")
        if source != path:
            write(source, x)
        env = [f"{name}={value}" for name, value in (function.env or {}).items()]
        words = function.line(source, path.with_name(f"{path.stem}-output.{function.format}"))
        return shlex.join([*(["env", *env] if env else []), *words])
    stored = path.with_name("function.pkl")
    try:
        stored.write_bytes(by_value(partial(work.answer, function, list(kind))))
    except Exception:  # only a function that is called in this process
        name = getattr(function, "__name__", "")
        return f"{name if name.isidentifier() else 'function'}(numpy.load({str(path)!r}))"
    code = f"import pickle, numpy; print(pickle.load(open({str(stored)!r}, 'rb'))(numpy.load({str(path)!r})))"
    return shlex.join([sys.executable, "-c", code])
