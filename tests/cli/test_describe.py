"""`invguide solvers DPS` and its like: one solver, operator or prior in full, settings included."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest

import invguide.operators as operators
import invguide.priors as priors
import invguide.solvers as solvers
from invguide.arguments.docstrings import described
from invguide.priors.checkpoints.catalogue import PUBLIC, RECOGNISED
from invguide.priors.checkpoints.embedded import EMBEDDED
from tiny import run


def on_one_line(text: str | None) -> str:
    return " ".join((text or "").split())


@pytest.mark.parametrize("name", solvers.__all__)
def test_solvers_in_full(name: str):
    """The whole docstring arrives, and each setting with its default."""
    kind = getattr(solvers, name)
    printed = run("solvers", name)
    assert printed.startswith(f"{name}  [needs ")
    for field in fields(kind):
        assert f"\n    {field.name} = {field.default!r}  (" in printed
    before, _ = inspect.cleandoc(kind.__doc__).split("\n\nArgs:\n")
    head = printed.splitlines()[0]
    assert on_one_line(printed).startswith(on_one_line(f"{head} {before} Settings:"))
    assert described(kind)
    for told in described(kind).values():
        assert told in on_one_line(printed)


def test_algorithms_keep_their_lines():
    told = inspect.cleandoc(solvers.DPS.__doc__ or "")
    algorithm = told[told.index("Algorithm:") : told.index("\n\nSource:")]
    assert algorithm.count("\n") == 5
    assert algorithm in run("solvers", "DPS")
    assert "Algorithm: inside the window\n    r = sum" in run("solvers", "FeatureGuidance")


def test_several_names_in_any_spelling():
    printed = run("solvers", "dps", "red-diff", "dps_zeroth_order")
    heads = [line.partition("  [")[0] for line in printed.splitlines() if "  [needs " in line]
    assert heads == ["DPS", "REDDiff", "DPSZerothOrder"]


@pytest.mark.parametrize(
    ("command", "name", "told"),
    [
        ("solvers", "DSP", "unknown solver 'DSP'; did you mean 'DPS'?"),
        ("operators", "Gaussianblurr", "did you mean 'GaussianBlur'?"),
        ("priors", "naturall", "did you mean 'natural'?"),
    ],
)
def test_unknown_names_get_the_nearest(command: str, name: str, told: str):
    assert told in run(command, name, code=2)
    assert "[" not in run(command, "DPS" if command == "solvers" else "Blur", name, code=2)


@pytest.mark.parametrize("name", operators.__all__)
def test_operators_in_full(name: str):
    printed = run("operators", name)
    linear = {"HDR": "non", "JPEG": "non", "NonlinearBlur": "non"}.get(name, "") + "linear"
    assert printed.startswith(f"{name}  [{linear}")
    for told in described(getattr(operators, name)).values():
        assert told in on_one_line(printed)
    if name == "Identity":
        assert "Settings:\n    none\n" in printed
    if name == "SuperResolution":
        assert "\n    factor  (a whole number from 2 to 1000)\n" in printed
        assert "\n    filter = 'bicubic'  (" in printed
        assert "\n    torch.Size([1, 3, 8, 12])" in printed


@pytest.mark.slow
def test_priors_in_full():
    for name in priors.__all__:
        printed = run("priors", name)
        assert printed.startswith(f"{name}  [ig.priors.{name}]")
        assert "Settings:\n    " in printed
    assert '    | "ve" | 1 | sigma |\n' in run("priors", "from_network"), "tables keep their lines"
    for name in EMBEDDED:
        assert f"# {name}\n" in run("priors", name), "its model card"
    for entry in (*RECOGNISED, *PUBLIC):
        printed = on_one_line(run("priors", entry.name))
        assert entry.line in printed
        assert on_one_line(entry.description) in printed
