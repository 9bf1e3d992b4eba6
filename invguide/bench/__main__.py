"""`python -m invguide.bench restore --data photos.npz --out runs/bench`: the tables, one option per argument."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from invguide import bench
from invguide.errors import InputError, RunError
from invguide.tables import Table

TABLES: dict[str, Callable[..., Table]] = {
    "restore": bench.restore,
    "calibration": bench.calibration,
    "driver": bench.driver,
    "peers": bench.peers,
}


def _add(parser: argparse.ArgumentParser, parameter: inspect.Parameter) -> None:
    """One option of the parameter's name, read as its default is; sequences are separated by commas."""
    default: Any = None if parameter.default is parameter.empty else parameter.default
    kind: Callable[[str], Any] = str if default is None else type(default)
    if parameter.name in ("data", "out"):
        kind = Path
    elif isinstance(default, tuple):
        item = type(default[0])
        kind = lambda text: tuple(item(part) for part in text.split(","))  # noqa: E731
    flag = "--" + parameter.name.replace("_", "-")
    parser.add_argument(flag, type=kind, default=default, required=parameter.name == "data")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m invguide.bench", description=__doc__)
    commands = parser.add_subparsers(dest="table", required=True)
    for name, function in TABLES.items():
        summary = (function.__doc__ or "").split("\n", 1)[0]
        command = commands.add_parser(name, help=summary, description=summary)
        for parameter in inspect.signature(function).parameters.values():
            if parameter.name != "progress":
                _add(command, parameter)
    settings = vars(parser.parse_args(arguments))
    try:
        print(TABLES[settings.pop("table")](**settings))
    except (InputError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
