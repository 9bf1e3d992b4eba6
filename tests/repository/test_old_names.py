"""Imports of before the folders: each still works, and those of modules that have moved say where they are now."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path

import pytest

import invguide
from invguide.renamed import MODULES, NAMES

# What README, notebooks, CONTRIBUTING and the tests imported then: "module: name name ..."
OLD = Path(__file__).with_name("old_imports.txt").read_text("utf-8").splitlines()


@pytest.mark.parametrize("line", OLD, ids=lambda line: line.partition(":")[0])
def test_public_imports_of_before_still_work(line: str) -> None:
    module, _, names = line.partition(":")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        statement = (
            f"from {module} import {', '.join(names.split())}" if names else f"import {module}"
        )
        exec(statement, {})  # noqa: S102


@pytest.mark.parametrize("old", sorted(MODULES))
def test_a_module_that_has_moved_says_so(old: str) -> None:
    import sys

    sys.modules.pop(f"invguide.{old}", None)
    with pytest.warns(DeprecationWarning, match=rf"invguide\.{MODULES[old]} now") as seen:
        there = importlib.import_module(f"invguide.{old}")
    here = importlib.import_module(f"invguide.{MODULES[old]}")
    public = [name for name in vars(here) if not name.startswith("_")]
    assert all(getattr(there, name) is getattr(here, name) for name in public)
    assert len(seen) == 1


@pytest.mark.parametrize(("module", "old"), [(m, n) for m in NAMES for n in NAMES[m]])
def test_a_name_that_has_moved_says_so(module: str, old: str) -> None:
    home, _, new = NAMES[module][old].partition(" ")
    there = importlib.import_module(f"invguide.{module}")
    with pytest.warns(DeprecationWarning, match=rf"invguide\.{home}\.{new or old} now"):
        found = getattr(there, old)
    assert found is getattr(importlib.import_module(f"invguide.{home}"), new or old)


def test_dir_shows_what_is_public_and_nothing_else() -> None:
    names = dir(invguide)
    assert set(invguide.__all__) <= set(names)
    assert all(not name.startswith("_") or name == "__version__" for name in names)
    assert all(getattr(invguide, name) is not None for name in names)
    assert {"solvers", "operators", "verify"} <= set(names)
    assert "MODULES" not in names
