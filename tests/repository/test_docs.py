"""The pages hold: their Python runs, their commands parse, their links lead somewhere, every bench has a page."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from invguide.cli import app
from invguide.cli.pages import TITLES
from pages import PAGES, ROOT, anchors, commands, name_of, python_blocks

BENCHMARKS = ROOT / "docs" / "benchmarks"

# The same code on a small crop, the small prior and few steps; random numbers as they fall are seeded.
SMALL = """
import dataclasses
import torch
import invguide
from invguide import api, driver

torch.manual_seed(0)
photo, load, run = invguide.example_photo(), api.load_prior, driver.run

def few_steps(solver, *arguments, **more):
    if solver.num_steps > 4:
        solver = dataclasses.replace(solver, num_steps=4)
    return run(solver, *arguments, **{**more, "progress": False})

invguide.example_photo = lambda: photo[..., 64:112, 40:104].contiguous()
api.load_prior = invguide.load_prior = lambda name, **more: load("natural-tiny" if name == "natural" else name, **more)
driver.run = few_steps
"""

# What each block prints, and what holds after it.
EXAMPLES = {
    "README.md": [
        (
            "4 of 4 samples finished; chi2",
            """
assert result.samples.shape == (1, 4, 3, 48, 64), result.samples.shape
assert {"panel.png", "manifest.json", "samples.npy"} <= {p.name for p in __import__("pathlib").Path("out").iterdir()}
""",
        )
    ],
    "docs/black_boxes.md": [
        (
            "'workers': 2",
            """
assert result.samples.shape == (1, 200, 8), result.samples.shape
assert abs(result.weights.sum() - 1) < 1e-5
""",
        )
    ],
    "docs/noise.md": [
        (
            "their noise made even",
            """
assert result.samples.shape == (1, 1, 3, 48, 64), result.samples.shape
assert torch.isfinite(result.samples).all()
""",
        )
    ],
    "docs/operators.md": [
        (
            "FunctionOperator(<lambda>): fit for use",
            """
assert result.samples.shape == (1, 1, 3, 48, 64), result.samples.shape
assert torch.isfinite(result.samples).all()
""",
        )
    ],
    "docs/priors.md": [
        (
            "\ncalls     100 of the network, 100 of its gradient",
            """
assert prior.denoise(torch.randn(1, 3, 48, 64), 0.5).shape == (1, 3, 48, 64)
""",
        )
    ],
    "docs/results.md": [
        (
            "2 of 2 samples finished; chi2",
            """
assert {"psnr"} <= set(result.metrics)
again = ig.solve(y, A, "natural", truth=x, **told)
assert torch.equal(again.samples, result.samples)
""",
        )
    ],
    "docs/rewards.md": [
        (
            "tensor([[",
            """
assert result.samples.shape == (1, 4, 3, 64, 64), result.samples.shape
assert torch.isfinite(result.samples).all()
""",
        ),
        (
            "\nSymplecticAdjoint ",
            """
assert result.samples.shape == (1, 2, 3, 64, 64), result.samples.shape
assert value.shape == (1,) and 0 < gradient.norm() < 1
""",
        ),
    ],
    "docs/solvers.md": [
        (
            "HQS",
            """
assert result.samples.shape == x[:, None].shape, result.samples.shape
""",
        )
    ],
}
BLOCKS = [
    pytest.param(block, i, name_of(page), id=f"{name_of(page)}-{i}")
    for page in PAGES
    if page.name != "CONTRIBUTING.md"  # test_contributing.py runs its examples
    for i, block in enumerate(python_blocks(page))
]
TOP: Any = get_command(app)
GROUPS = {"": set(TOP.commands), "bench": set(TOP.commands["bench"].commands)}
COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands(page)))


@pytest.mark.slow
@pytest.mark.parametrize(("block", "index", "page"), BLOCKS)
def test_python_runs(block: str, index: int, page: str, tmp_path: Path):
    printed, after = EXAMPLES[page][index]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([SMALL, block, after])],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},  # this checkout, whatever is installed
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert printed in done.stdout


def test_every_example_is_there():
    found = {page: sum(b.values[2] == page for b in BLOCKS) for page in EXAMPLES}
    assert found == {page: len(examples) for page, examples in EXAMPLES.items()}


def parse(command: str) -> Any:
    """Parse without running; the last context. A wrong option, command or value raises."""
    arguments = shlex.split(command)[1:]
    node, parent = get_command(app), None
    while hasattr(node, "commands"):
        context = node.make_context(node.name or "invguide", list(arguments), parent=parent)
        _, node, arguments = node.resolve_command(context, arguments)  # pyright: ignore[reportAttributeAccessIssue]
        parent = context
        assert node is not None, command
    return node.make_context(node.name, list(arguments), parent=parent)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses(command: str):
    parse(command)


def test_commands_are_found_and_wrong_ones_do_not_parse():
    assert GROUPS[""] <= {command.split()[1] for command in COMMANDS}
    for wrong in (
        "invguide demo --sampels 2",
        "invguide restor",
        "invguide bench restore --size x",
    ):
        # Of click, or of the copy of it in newer typer: a usage error has this code, whatever its words.
        with pytest.raises(Exception) as refused:
            parse(wrong)
        assert getattr(refused.value, "exit_code", None) == 2


def links(page: Path) -> list[str]:
    found = re.findall(r"\]\(([^)]+)\)", page.read_text("utf-8"))
    return [link for link in found if "://" not in link]


def leads_somewhere(page: Path, link: str) -> bool:
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    return target.exists() and (not anchor or anchor in anchors(target))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path):
    dead = [link for link in links(page) if not leads_somewhere(page, link)]
    assert not dead


def test_a_dead_link_is_found():
    page = ROOT / "README.md"
    assert len(links(page)) >= 6
    for dead in ("docs/solver.md", "CONTRIBUTING.md#add-a-sovler", "#command-lines"):
        assert not leads_somewhere(page, dead)


def test_every_page_is_reached():
    """From README.md, link by link."""
    seen, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop().resolve()
        if page not in seen and page.suffix == ".md":
            seen.add(page)
            ahead += [page.parent / link.partition("#")[0] for link in links(page)]
    assert {page.resolve() for page in PAGES} <= seen


@pytest.mark.parametrize("page", PAGES[3:], ids=name_of)
def test_a_page_begins_with_what_it_is_for(page: Path):
    title, blank, first = page.read_text("utf-8").splitlines()[:3]
    assert title.startswith("# ")
    assert not blank
    assert re.match(r"\w", first)


@pytest.mark.parametrize("name", TITLES)
def test_every_bench_has_a_page_or_a_reason(name: str):
    """Its heading is the one that --page looks for; a bench without page is named beside the reason."""
    page = BENCHMARKS / f"{name}.md"
    text = (BENCHMARKS / "README.md").read_text("utf-8")
    command = f"invguide {f'bench {name}' if name in GROUPS['bench'] else name}"
    if not page.exists():
        assert f"\n- `{command} " in text.split("## Without a page\n")[1]
        return
    assert f"]({page.name})" in text
    title, *sections = re.split(r"^#+ ", page.read_text("utf-8"), flags=re.MULTILINE)[1:]
    assert title.partition("\n")[0] == TITLES[name]
    measured = [s for s in sections if not s.startswith("Remarks\n")]
    assert measured
    for section in measured:
        assert section.startswith(f"`{command}"), section[:80]
        assert re.search(r"^Measured \d{4}-\d\d-\d\d", section, re.MULTILINE)
        assert "| --" in section


def test_pages_and_benches_are_the_same():
    assert set(TITLES) == {*GROUPS["bench"], "verify"}
    assert {page.stem for page in BENCHMARKS.glob("*.md")} <= {"README", *TITLES}
