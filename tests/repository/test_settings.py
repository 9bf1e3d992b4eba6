"""Every public solver, operator, prior, reward and noise law says what its settings are, and what they are by default.

The oracle is the signature; the planted classes show that each kind of slip is told.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any

import pytest

from invguide.arguments.docstrings import described, misdescribed, sections, stated_default

PACKAGES = ("solvers", "operators", "priors", "rewards", "noise")


def public() -> dict[str, Any]:
    found = {}
    for package in PACKAGES:
        module = import_module(f"invguide.{package}")
        found |= {f"{package}.{name}": getattr(module, name) for name in module.__all__}
    return found


PUBLIC = public()


@pytest.mark.parametrize("name", PUBLIC)
def test_settings_explain_themselves(name: str):
    assert misdescribed(PUBLIC[name]) == []


def test_there_is_something_to_look_at():
    """That the sections are found: a parser that finds none would agree with classes of no settings only."""
    for name, thing in PUBLIC.items():
        assert bool(described(thing)) == ("    Args:\n" in (thing.__doc__ or "")), name
    solvers = [thing for name, thing in PUBLIC.items() if name.startswith("solvers.")]
    assert sum(len(described(kind)) for kind in solvers) == sum(
        len(fields(kind)) for kind in solvers
    )
    assert described(PUBLIC["solvers.DPS"])["eta"].startswith("Noise that a step adds")


# ---- planted slips


@dataclass
class Right:
    """A planted class.

    Args:
        width: Pixels.
        scale: No unit. Default 1.0, which fits; lower where it
            is too much.
        name: One of "a" and "b". Default "a"; "b" where (1.5) holds.
        ends: Fractions. Default (0.0, 1.0): all.
        end: Last level. Default None: that of y.
        flag: Whether. Default False.

    Raises:
        nothing: At all.
    """

    width: int
    scale: float = 1.0
    name: str = "a"
    ends: tuple[float, float] = (0.0, 1.0)
    end: float | None = None
    flag: bool = False


def test_a_right_class_passes():
    assert misdescribed(Right) == []
    assert list(described(Right)) == ["width", "scale", "name", "ends", "end", "flag"]
    assert described(Right)["scale"].endswith("lower where it is too much.")
    assert list(sections(Right)) == ["", "Args", "Raises"]


@pytest.mark.parametrize(
    ("old", "new", "wrong"),
    [
        ("        end: Last level. Default None: that of y.\n", "", "end is not described"),
        ("width: Pixels.", "length: Pixels.", "length is described, and no setting"),
        ("Default 1.0, which", "Default 10, which", "scale tells the default 10, and has 1.0"),
        ("Default 1.0, which fits", "1.0", "scale does not tell its default, 1.0"),
        ('Default "a"', 'Default "b"', "name tells the default 'b', and has 'a'"),
        ('Default "a"', "Default a", "name does not tell its default, 'a'"),
        ("(0.0, 1.0): all", "(0.0, 0.5): half", "ends tells the default (0.0, 0.5)"),
        ("Default None: that", "Default 0.02: that", "end tells the default 0.02, and has None"),
        ("Default False", "Default 0", "flag tells the default 0, and has False"),
        ("width: Pixels.", "width: Pixels. Default 3.", "width has no default, and one is told"),
        ("    Args:\n", "    Arguments are\n", "scale is not described"),
    ],
)
def test_planted_slips_are_told(old: str, new: str, wrong: str):
    doc = Right.__doc__ or ""
    assert old in doc
    planted = type("Right", (Right,), {"__doc__": doc.replace(old, new)})
    assert any(phrase.startswith(wrong) for phrase in misdescribed(planted)), misdescribed(planted)


@pytest.mark.parametrize(
    ("text", "default"),
    [
        ("Default 1.", 1),
        ("Default 1e-4; more", 1e-4),
        ("Default 0.", 0),
        ("Default (3, None, None), colour.", (3, None, None)),
        ("Default (), none; (2, 2) for quarters.", ()),
        ('Default "dpm++2m", second order', "dpm++2m"),
    ],
)
def test_defaults_in_sentences(text: str, default: Any):
    assert stated_default(text) == default
