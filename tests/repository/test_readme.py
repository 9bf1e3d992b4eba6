"""README.md holds: its Python runs, its commands parse, its table of solvers is true, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.main import get_command

import invguide.solvers
from invguide import Likelihood, Problem, driver
from invguide.cli.terminal import app
from invguide.noise import Poisson
from invguide.operators import Identity
from invguide.priors import Gaussian, from_network
from invguide.reward import EditReward
from invguide.rewards import FeatureReward, Motion
from invguide.solver import EnsembleSolver, Requires

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text("utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)

# The same code on a small crop, the small prior and few steps; random numbers as they fall are seeded.
SMALL = """
import dataclasses
import torch
import invguide
from invguide import api, driver, images

torch.manual_seed(0)
read, load, run = images.read_picture, api.load_prior, driver.run

def read_picture(path):
    picture = read(path)
    return dataclasses.replace(picture, values=picture.values[..., 64:112, 40:104].contiguous())

def few_steps(solver, *arguments, **more):
    steps = min(4, solver.num_steps)
    return run(dataclasses.replace(solver, num_steps=steps), *arguments, **{**more, "progress": False})

images.read_picture = read_picture
api.load_prior = invguide.load_prior = lambda name, **more: load("natural-tiny" if name == "natural" else name, **more)
driver.run = few_steps
"""
AFTER = (
    """
assert result.samples.shape == (1, 4, 3, 48, 64), result.samples.shape
assert {"panel.png", "manifest.json", "samples.npy"} <= {p.name for p in __import__("pathlib").Path("out").iterdir()}
""",
    """
assert result.samples.shape == (1, 4, 3, 64, 64), result.samples.shape
assert torch.isfinite(result.samples).all()
""",
    """
assert prior.denoise(torch.randn(1, 3, 48, 64), 0.5).shape == (1, 3, 48, 64)
""",
    """
assert result.samples.shape == (1, 200, 8), result.samples.shape
assert abs(result.weights.sum() - 1) < 1e-5
""",
    """
assert result.samples.shape == (1, 2, 3, 64, 64), result.samples.shape
assert value.shape == (1,) and 0 < gradient.norm() < 1
""",
)


def commands() -> list[str]:
    """Every `invguide ...` in the README: shell blocks, comments, and code within sentences."""
    blocks = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
    comments = re.findall(r"<!--(.*?)-->", TEXT, re.DOTALL)
    lines = [line for text in (*blocks, *comments) for line in text.splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
    parts += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    return list(dict.fromkeys(part for part in parts if part.startswith("invguide ")))


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


def table_of_solvers() -> dict[str, dict[str, str]]:
    section = TEXT.split("## Solvers\n")[1].split("\n## ")[0]
    rows = [
        [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("|")
    ]
    head, _, *body = rows
    return {row[0]: dict(zip(head, row, strict=True)) for row in body}


@pytest.mark.parametrize("index", range(len(PYTHON)))
def test_python_runs(index: int, tmp_path: Path):
    code = "\n".join([SMALL, PYTHON[index], AFTER[index]])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    printed = (
        "4 of 4 samples finished; chi2",
        "FunctionOperator(<lambda>): fit for use",
        "\ncalls     100 of the network, 100 of its gradient",
        "'workers': 2",
        "\nSymplecticAdjoint ",
    )
    assert printed[index] in done.stdout


def test_ten_lines():
    lines = [line for line in PYTHON[0].splitlines() if line.strip()]
    assert len(lines) == 10


def test_the_two_commands_of_a_fresh_machine():
    assert "\npip install -e . && invguide demo\n" in TEXT
    assert '\npip install -e ".[test]" && python -m pytest -n 2\n' in TEXT


@pytest.mark.parametrize("command", commands())
def test_command_parses(command: str):
    parse(command)


def test_commands_are_found_and_wrong_ones_do_not_parse():
    found = {command.split()[1] for command in commands()}
    assert found >= {
        "restore",
        "degrade",
        "demo",
        "doctor",
        "plan",
        "solvers",
        "operators",
        "priors",
        "verify",
    }
    assert {"bench restore", "bench calibration", "bench driver"} <= {
        " ".join(command.split()[1:3]) for command in commands()
    }
    for wrong in (
        "invguide demo --sampels 2",
        "invguide restor",
        "invguide bench restore --size x",
    ):
        # Of click, or of the copy of it in newer typer: a usage error has this code, whatever its words.
        with pytest.raises(Exception) as refused:
            parse(wrong)
        assert getattr(refused.value, "exit_code", None) == 2


def test_every_solver_is_in_the_table():
    assert set(table_of_solvers()) == set(invguide.solvers.__all__)


@pytest.mark.parametrize("name", invguide.solvers.__all__)
def test_needs_of_a_solver(name: str):
    kind = getattr(invguide.solvers, name)
    row, requires = table_of_solvers()[name], kind.requires
    target = {"likelihood": "measurement", "either": "measurement or reward"}
    assert row["target"] == target.get(requires.target, requires.target)
    assert row["operator"] == needed(requires)
    assert row["gradient of prior"] == ("yes" if requires.prior_vjp else "no")
    if issubclass(kind, EnsembleSolver):
        assert row["gives"] == "an ensemble"
        return
    result = driver.run(kind(), example(requires), 1)
    assert float(row["network calls"]) == result.nfe


class Shrink(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Tanh()

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def example(requires: Requires) -> Problem:
    """The smallest problem that such a solver takes."""
    if requires.reward is FeatureReward:
        prior = from_network(Shrink(), "x0", "ve", shape=(2,))
        return Problem(
            prior, reward=FeatureReward(prior, "net.body", lambda f: f["net.body"].sum(1))
        )
    if requires.reward is EditReward:
        prior = Gaussian(torch.zeros(1, 2, 2), torch.eye(4))
        return Problem(prior, reward=Motion(torch.rand(1, 2, 2), torch.ones(2, 2, 2)))
    prior = Gaussian([0.0, 0.0], torch.eye(2))
    if requires.counts:
        prior.symmetric = True
        return Problem(prior, Likelihood(Identity(), torch.ones(1, 2), Poisson(0.2)))
    return Problem(prior, Likelihood(Identity(), torch.zeros(1, 2), 0.5))


def needed(requires: Requires) -> str:
    if requires.target == "none":
        return "any"
    return "linear" if requires.linear else "differentiable" if requires.gradient else "any"


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    local = [link for link in links if "://" not in link]
    assert len(local) >= 6
    anchors = {
        re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in TEXT.splitlines()
        if line.startswith("#")
    }
    for link in local:
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists(), link
        assert not anchor or path or anchor in anchors, link


def test_layout_is_there():
    section = TEXT.split("## Layout\n")[1].split("\n## ")[0]
    entries = re.findall(r"^(\S+) {2,}\S", section, re.MULTILINE)
    assert len(entries) == 14
    for entry in entries:
        assert (ROOT / entry).exists(), entry


def test_tables_stand_between_markers():
    """Whatever fills them later, each table keeps its markers and the command that prints it."""
    for name in ("bench restore", "bench calibration", "verify", "bench priors", "bench driver"):
        found = re.findall(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", TEXT, re.DOTALL)
        assert len(found) == 1, name
        assert f"\ninvguide {name}" in found[0], name
