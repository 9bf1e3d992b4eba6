"""One solver, operator or prior in full, from its docstring and signature: `invguide solvers DPS`."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from invguide.cli.terminal import text_width
from invguide.errors import InputError, suggest

PROSE = ("", "Source", "Differences", "Bias")  # filled to the width; other sections are laid out


def look_up(name: str, things: Mapping[str, Any], what: str) -> tuple[str, Any]:
    """Return the thing of this name, whatever its capitals, dashes and underscores, and its own spelling.

    Raises:
        InputError: There is none; the message tells the nearest.
    """
    spelling = {_plain(known): known for known in things}
    if _plain(name) not in spelling:
        raise InputError(f"unknown {what} {name!r}; {suggest(name, things)}")
    own = spelling[_plain(name)]
    return own, things[own]


def _plain(name: str) -> str:
    return re.sub(r"[-_ ]", "", name.lower())


def describe(
    names: Iterable[str],
    things: Mapping[str, Any],
    what: str,
    details: Callable[[Any], str],
) -> None:
    """Print the full description of each: summary, sections of its docstring, settings.

    Args:
        names: In any spelling.
        things: Classes and functions by name.
        what: "solver" ..., for the error message.
        details: Of one thing, what the list prints in brackets after its name.

    Raises:
        InputError: A name is unknown, before anything is printed.
    """
    chosen = [look_up(name, things, what) for name in names]
    print("\n\n".join(full_text(name, thing, details(thing)) for name, thing in chosen))


def describe_priors(names: Iterable[str]) -> None:
    """The same of priors that ship, kinds that can be loaded, public checkpoints, and what `ig.priors` has."""
    import invguide.priors as package
    from invguide.priors.checkpoints.catalogue import PUBLIC, RECOGNISED, Entry
    from invguide.priors.checkpoints.embedded import EMBEDDED, Embedded, weights_path

    things: dict[str, Any] = {entry.name: entry for entry in (*PUBLIC, *RECOGNISED)}
    things |= {name: getattr(package, name) for name in package.__all__}
    things |= EMBEDDED
    texts = []
    for name, thing in [look_up(name, things, "prior") for name in names]:
        if isinstance(thing, Embedded):
            card = weights_path(name).with_suffix(".md")
            texts.append(card.read_text("utf-8").strip() if card.exists() else thing.description)
        elif isinstance(thing, Entry):
            texts.append(f"{name}  [{thing.line}]\n" + _filled(thing.description, "    "))
        else:
            texts.append(full_text(name, thing, f"ig.priors.{name}"))
    print("\n\n".join(texts))


def full_text(name: str, thing: Any, detail: str) -> str:
    """The description of a class or function, as long as it is."""
    from invguide.arguments.docstrings import sections

    parts = sections(thing)
    texts = [f"{name}  [{detail}]", _prose(parts.pop(""), "    ")]
    settings = _settings(thing)
    parts.setdefault("Args", "")
    for section, text in parts.items():
        first, _, rest = text.partition("\n")
        if section == "Args":
            texts.append("Settings:\n" + (settings or "    none"))
        elif section in PROSE:
            texts.append(f"{section}:\n{_prose(textwrap.dedent(text), '    ')}")
        elif first.startswith(" "):
            texts.append(f"{section}:\n{text}")
        else:  # the section says something on its first line
            texts.append(f"{section}: {first}\n{rest}".rstrip())
    return "\n\n".join(texts)


def _settings(thing: Any) -> str:
    """Each setting with its default, what it may be, and what its docstring says."""
    from invguide.arguments.checks import expected_arguments
    from invguide.arguments.docstrings import described, parameters

    told = described(thing)
    expected = expected_arguments(thing) if isinstance(thing, type) else {}
    lines = []
    for name, parameter in parameters(thing).items():
        plain = parameter.default is inspect.Parameter.empty
        default = "" if plain else f" = {parameter.default!r}"
        rule = f"  ({expected[name]})" if name in expected else ""
        lines.append(f"    {name}{default}{rule}")
        lines.append(_filled(told.get(name, ""), " " * 8))
    return "\n".join(filter(None, lines))


def _prose(text: str, indent: str) -> str:
    """Paragraphs filled to the width, but for those that are laid out: indented lines, tables."""
    paragraphs = []
    for paragraph in text.split("\n\n"):
        laid_out = any(line.startswith((" ", "|")) for line in paragraph.splitlines())
        kept = textwrap.indent(paragraph, indent)
        paragraphs.append(kept if laid_out else _filled(paragraph, indent))
    return "\n\n".join(paragraphs)


def _filled(text: str, indent: str) -> str:
    width = text_width() - len(indent)
    lines = textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)
    return textwrap.indent("\n".join(lines), indent)
