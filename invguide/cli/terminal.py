"""What every command shares: how errors are printed, exit codes, and the options that mean the same everywhere."""

from __future__ import annotations

import functools
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

RUN_FAILED, BAD_INPUT = 1, 2

Seed = Annotated[int, typer.Option(help="Equal seeds give equal results.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:all, ...")]


class Group(TyperGroup):
    """Reports wrong usage as every other error: one line, exit code 2."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        try:
            code = super().main(*args, standalone_mode=False, **extra)
        except Exception as error:
            # Click's own errors, whichever copy of click typer carries.
            if not standalone_mode or not hasattr(error, "format_message"):
                raise
            message = error.format_message()  # pyright: ignore[reportAttributeAccessIssue]
            if type(error).__name__ == "NoArgsIsHelpError":
                print(message)
            else:
                print_error(message)
            sys.exit(BAD_INPUT)
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else 0)
        return code


def print_error(message: str) -> None:
    print("error: " + " ".join(message.split()), file=sys.stderr)


@contextmanager
def reporting() -> Iterator[None]:
    """Turn our errors into one line and an exit code, and our warnings into notes."""
    from invguide.errors import InputError, InvguideError

    package = Path(__file__).resolve().parents[1]
    ours = (package, package.parent / "operators", package.parent / "solvers")
    said: set[str] = set()

    def note(message: Any, category: Any, filename: str, *_: Any) -> None:
        text = " ".join(str(message).split())
        where = Path(filename).resolve()
        if any(where.is_relative_to(place) for place in ours) and text not in said:
            said.add(text)
            print(f"note: {text}", file=sys.stderr)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            yield
    except InputError as error:
        print_error(str(error))
        raise typer.Exit(BAD_INPUT) from error
    except InvguideError as error:
        print_error(str(error))
        raise typer.Exit(RUN_FAILED) from error
    except BrokenPipeError:
        raise
    except OSError as error:
        print_error(
            f"{error.strerror or error}: {error.filename}" if error.filename else str(error)
        )
        raise typer.Exit(RUN_FAILED) from error
    except KeyboardInterrupt:
        print_error("interrupted")
        raise typer.Exit(RUN_FAILED) from None


app = typer.Typer(
    cls=Group,
    help="Restore pictures with a diffusion prior, and show how sure the result is.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def command(name: str, parent: typer.Typer) -> Callable[[Callable[..., None]], Any]:
    """Register a function as a command of `parent` that reports its errors."""

    def register(function: Callable[..., None]) -> Any:
        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> None:
            with reporting():
                function(*args, **kwargs)

        return parent.command(name)(guarded)

    return register


def pairs(items: Iterable[str] | None, option: str, example: str) -> dict[str, str]:
    """Return {NAME: VALUE} of the texts NAME=VALUE of an option, dashes in names made underscores."""
    from invguide.errors import InputError

    pairs = {}
    for item in items or ():
        name, equals, value = item.partition("=")
        if not (name and equals and value):
            raise InputError(f"{option} {item!r}; expected NAME=VALUE, such as {option} {example}")
        pairs[name.replace("-", "_")] = value
    return pairs


def say(line: str) -> None:
    print(line, flush=True)


def text_width() -> int:
    """How many columns prose is filled to."""
    return min(110, max(60, shutil.get_terminal_size((100, 24)).columns))


def print_entry(name: str, details: Iterable[str], lines: Iterable[str]) -> None:
    width = text_width() - 4
    print(f"{name}  [{', '.join(filter(None, details))}]")
    for line in filter(None, lines):
        print(textwrap.indent(textwrap.fill(line, width), "    "))
    print()


def print_table(
    head: tuple[str, ...], rows: list[tuple[str, ...]], say: Callable[[str], None]
) -> None:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = [
            c.rjust(w) if i in (2, 3) else c.ljust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        say("  ".join(cells).rstrip())
