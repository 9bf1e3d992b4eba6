"""README.md holds: it is short, and what a fresh machine is told works literally."""

from __future__ import annotations

from pages import README, python_blocks

TEXT = README.read_text("utf-8")


def test_it_is_read_in_one_sitting():
    assert len(TEXT.splitlines()) <= 150


def test_ten_lines():
    (code,) = python_blocks(README)
    assert len([line for line in code.splitlines() if line.strip()]) == 10
    shell = TEXT.split("## The command line in ten lines\n\n```sh\n")[1].split("```")[0]
    assert len(shell.splitlines()) == 10


def test_six_rows_of_solvers():
    section = TEXT.split("## Which solver\n")[1].split("\n## ")[0]
    assert sum(line.startswith("|") for line in section.splitlines()) == 2 + 6


def test_the_two_commands_of_a_fresh_machine():
    assert "\npip install -e . && invguide demo\n" in TEXT
    assert '\npip install -e ".[test]" && python -m pytest -n 2\n' in TEXT
