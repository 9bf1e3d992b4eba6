"""What every command that measures shares: its table is printed and, with --page, written to a page of the docs."""

from __future__ import annotations

import functools
import inspect
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from invguide.cli.terminal import RUN_FAILED, command

TITLES: dict[str, str] = {}  # of the page of each command that measures
Page = Annotated[
    Path | None,
    typer.Option(
        "--page",
        help="Markdown file that keeps the table, with the command, the day and the machine.",
    ),
]


def measurement(
    name: str,
    parent: typer.Typer,
    title: str,
    failed: Callable[[Any], bool] = lambda table: False,
) -> Callable[[Callable[..., Any]], Any]:
    """Register a function that returns a table as a command of `parent`, with the option --page.

    The page begins with `title` and the docstring of the function: what is measured, and why.

    Args:
        name: Of the command.
        parent: The commands that it joins.
        title: Heading of its page.
        failed: Whether the command ends with the exit code of a failed run.
    """

    def register(function: Callable[..., Any]) -> Any:
        TITLES[name] = title
        about = inspect.cleandoc(function.__doc__ or "")

        @functools.wraps(function)
        def shown(context: typer.Context, page: Path | None = None, **settings: Any) -> None:
            from invguide.bench.pages import check_page, write_page

            if page is not None:
                check_page(page, title)
            table = function(**settings)
            print(table)
            if page is not None:
                write_page(page, title, about, _as_given(context, settings), str(table))
            if failed(table):
                raise typer.Exit(RUN_FAILED)

        _add_parameters(shown, function)
        return command(name, parent)(shown)

    return register


def _add_parameters(shown: Callable[..., Any], function: Callable[..., Any]) -> None:
    """Let typer see the parameters of a function and, as keywords, the context and --page."""
    # Not typing.get_type_hints, which on Python 3.10 makes Optional of what has the default None.
    own = list(inspect.signature(function, eval_str=True).parameters.values())
    keyword = inspect.Parameter.KEYWORD_ONLY
    added = [
        inspect.Parameter("page", keyword, default=None, annotation=Page),
        inspect.Parameter("context", keyword, annotation=typer.Context),
    ]
    shown.__signature__ = inspect.Signature([*own, *added])  # pyright: ignore[reportFunctionMemberAccess]
    shown.__annotations__ = {p.name: p.annotation for p in (*own, *added)}


def _as_given(context: typer.Context, settings: Mapping[str, Any]) -> str:
    """The command with the arguments that were given; of paths the last part only, which says nothing of a machine."""
    words = ["invguide", *context.command_path.split()[1:]]
    for parameter in context.command.params:
        source, name = context.get_parameter_source(parameter.name or ""), parameter.name
        if name not in settings or source is None or source.name != "COMMANDLINE":
            continue
        value = settings[name]
        option = parameter.opts[0] if parameter.param_type_name == "option" else ""
        if isinstance(value, bool):
            words.append(option if value else parameter.secondary_opts[0])
            continue
        for one in value if isinstance(value, list | tuple) else [value]:
            text = one.name if isinstance(one, Path) else str(one)
            text = text.removesuffix(".0") if isinstance(one, float) else text
            words += [option, text] if option else [text]
    return shlex.join(words)
