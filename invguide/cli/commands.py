"""The command line: a thin skin over `restoration`, `api`, `verify` and `bench`, which are imported when needed.

Exit codes: 0; 1 where a run failed; 2 for bad input, with one line on standard error that begins with "error:".
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from invguide.cli import bench_photos, check, lists, restore  # noqa: F401  register their commands
from invguide.cli.bench import bench
from invguide.cli.terminal import RUN_FAILED, app
from invguide.system.threads import be_passive

app.add_typer(bench, name="bench")


def main() -> None:
    """Entry point of the command `invguide`; nothing before it may import torch, which reads the wait policy once."""
    be_passive()
    try:
        app(prog_name="invguide")
    except BrokenPipeError:  # `invguide solvers | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(RUN_FAILED)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"invguide {version('invguide')}")
        raise typer.Exit()


@app.callback()
def _top(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


if __name__ == "__main__":
    main()
