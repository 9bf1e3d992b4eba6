"""Pages that a bench writes: what stands on them, what is kept, and what is refused before the bench runs."""

from __future__ import annotations

import re
import shlex
import socket
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch

from invguide import bench
from invguide.bench.bad_calls import Tally
from invguide.bench.pages import machine
from invguide.system.tables import Table
from tiny import run

TITLE = "Denoising"


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `bench denoise` was called with; it returns a table that counts the calls."""
    calls: list[dict[str, Any]] = []

    def denoise(data: Path, **settings: Any) -> Table:
        calls.append({"data": data, **settings})
        return Table(("method", "dB"), (("ours", str(len(calls))),), ("In dB.",))

    monkeypatch.setattr(bench, "denoise", denoise)
    return calls


def sections(page: Path) -> list[str]:
    return page.read_text("utf-8").split("\n## ")


def test_a_page_says_what_how_when_and_where(tmp_path: Path, ran: list[dict[str, Any]]):
    page, data = tmp_path / "new" / "page.md", tmp_path / "some photos.npz"
    given = ("--data", data, "--level", 25, "--level", 50, "--no-tv", "--seed", 0)
    printed = run("bench", "denoise", *given, "--page", page)
    assert ran[0]["levels"] == [25.0, 50.0]
    head, body = sections(page)
    title, _, about = head.split("\n", 2)
    assert title == f"# {TITLE}"
    told = " ".join(run("bench", "denoise", "--help").split())
    assert " ".join(about.split()) in told
    heading, measured, table = body.split("\n\n", 2)
    expected = ["--data", "some photos.npz", "--level", "25", "--level", "50"]
    assert sorted(shlex.split(heading.strip("`"))) == sorted(
        ["invguide", "bench", "denoise", *expected, "--no-tv", "--seed", "0"]
    )
    assert measured.startswith(f"Measured {date.today().isoformat()} on ")
    assert f"torch {torch.__version__}" in measured
    assert table == printed == "| method |  dB |\n| ------ | --: |\n| ours   |   1 |\n\nIn dB.\n"
    assert str(tmp_path) not in page.read_text("utf-8")


def test_the_same_command_replaces_its_section_and_others_stay(
    tmp_path: Path, ran: list[dict[str, Any]]
):
    page = tmp_path / "page.md"
    for level in (25, 50):
        run("bench", "denoise", "--data", "a.npz", "--level", level, "--page", page)
    with page.open("a", encoding="utf-8") as file:
        file.write("\n## Remarks\n\nBy hand.\n")
    run("bench", "denoise", "--data", "a.npz", "--level", 25, "--page", page)
    _, first, second, remarks = sections(page)
    assert "--level 25`" in first
    assert "| ours   |   3 |" in first
    assert "--level 50`" in second
    assert "| ours   |   2 |" in second
    assert remarks == "Remarks\n\nBy hand.\n"


def test_another_file_is_refused_before_the_bench(tmp_path: Path, ran: list[dict[str, Any]]):
    page = tmp_path / "README.md"
    page.write_text("# Something else\n", "utf-8")
    said = run("bench", "denoise", "--data", "a.npz", "--page", page, code=2)
    assert f"begins with '# Something else'; expected '# {TITLE}'" in said
    said = run("bench", "denoise", "--data", "a.npz", "--page", tmp_path, code=1)
    assert "directory" in said.lower()
    assert not ran
    assert page.read_text("utf-8") == "# Something else\n"


def test_faults_end_the_command_with_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench, "bad_calls", lambda *arguments: Tally(faults=["raw: solve()"]))
    page = tmp_path / "page.md"
    printed = run("bench", "bad-calls", "--page", page, code=1)
    assert "\n- raw: solve()\n" in printed
    assert printed.strip() in page.read_text("utf-8")


def test_verify_has_a_page_too(tmp_path: Path):
    page = tmp_path / "page.md"
    printed = run("verify", "diffpir", "--target", "gaussian-2d", "--steps", 3, "--page", page)
    rows = [line for line in printed.splitlines() if line.startswith("|")]  # no progress bar
    assert len(rows) == 2 + 3
    assert "\n".join(rows) in page.read_text("utf-8")
    assert "\n## `invguide verify diffpir --target gaussian-2d --steps 3`\n" in page.read_text(
        "utf-8"
    )


def test_the_machine_is_told_without_its_name():
    words = machine()
    assert socket.gethostname() not in words
    assert torch.backends.cpu.get_cpu_capability() in words
    assert re.match(r"\d+ \S+ cores", words)
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    assert all(name in words for name in names) if names else "no GPU" in words
