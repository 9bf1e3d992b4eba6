"""What docstrings say of settings: sections, the entries of `Args:`, and where they differ from the signature.

An entry tells what a setting is, its unit, its default as a literal of Python after the word Default, and when to
change it: `step_size: Of "normalized", no unit, above 0. Default 2.0; lower where ...`.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from typing import Any

from torch import nn

HEADER = re.compile(r"([A-Z][a-z]+):(| .*)")
ENTRY = re.compile(r"    \*{0,2}(\w+): (.*)")
END = re.compile(r"[;:,.](?=\s|$)")  # of a default in a sentence, and not the point in 1.0


def sections(thing: Any) -> dict[str, str]:
    """Return the docstring of a class or function by sections: "" is what comes first, {"Args": ...} indented text.

    A section begins after an empty line with its name and a colon; what follows the colon on that line is its first.
    """
    parts, name = {"": ""}, ""
    lines = inspect.cleandoc(thing.__doc__ or "").splitlines()
    for before, line, after in zip(["", *lines], lines, [*lines[1:], ""], strict=False):
        header = HEADER.fullmatch(line)
        if header and not before and after.startswith("    "):
            name, first = header.groups()
            parts[name] = first.strip()
        else:
            parts[name] += f"\n{line}"
    return {name: text.strip("\n") for name, text in parts.items()}


def described(thing: Any) -> dict[str, str]:
    """Return {setting: what `Args:` says of it, on one line}."""
    entries: dict[str, str] = {}
    name = None
    for line in sections(thing).get("Args", "").splitlines():
        entry = ENTRY.fullmatch(line)
        if entry:
            name = entry[1]
            entries[name] = entry[2]
        elif name is not None and line.startswith("     "):
            entries[name] += f" {line.strip()}"
        else:  # what follows the section without a header
            name = None
    return entries


def parameters(thing: Any) -> dict[str, inspect.Parameter]:
    """Return what a class or function is called with; none of a class without a constructor of its own."""
    if isinstance(thing, type) and thing.__init__ in (object.__init__, nn.Module.__init__):
        return {}
    return dict(inspect.signature(thing).parameters)


def stated_default(text: str) -> Any:
    """Return the default that a description names.

    Raises:
        ValueError: It names none, or something else than a literal.
    """
    _, found, rest = text.partition("Default ")
    for end in END.finditer(rest) if found else ():
        try:
            return ast.literal_eval(rest[: end.start()])
        except (ValueError, SyntaxError):  # the point or comma of a longer one
            continue
    raise ValueError(f"no default in {text!r}")


def misdescribed(thing: Callable[..., Any]) -> list[str]:
    """Return where the Args section of a class or function differs from its signature, as phrases; empty: nowhere.

    Every parameter is described and nothing else is; a default is told, and is that of the signature.
    """
    told, known = described(thing), parameters(thing)
    wrong = [f"{name} is not described" for name in known if name not in told]
    wrong += [f"{name} is described, and no setting" for name in told if name not in known]
    for name in (n for n in known if n in told):
        default = known[name].default
        if default is inspect.Parameter.empty:
            if "Default " in told[name]:
                wrong.append(f"{name} has no default, and one is told")
            continue
        try:
            stated = stated_default(told[name])
        except ValueError:
            wrong.append(f"{name} does not tell its default, {default!r}")
            continue
        if stated != default or isinstance(stated, bool) != isinstance(default, bool):
            wrong.append(f"{name} tells the default {stated!r}, and has {default!r}")
    return wrong
