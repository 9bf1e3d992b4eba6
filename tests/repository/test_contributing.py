"""The examples of CONTRIBUTING.md run as written and fit together."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "CONTRIBUTING.md"

# In an interpreter of its own: a solver class enters the registry when it is defined.
USE = """
import torch
from invguide.driver import run
from invguide.likelihood import Likelihood
from invguide.problem.problem import Problem
from invguide.solvers import Unconditional

x, y = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
A, prior = Flip(), White()
dot = ((A(x) * y).sum() - (x * A.adjoint(y)).sum()).abs() / (x.norm() * y.norm())
assert dot < 1e-6, dot
assert A(x).ne(x).any()
mirrored, skewed = torch.tensor([[[1.0, 2.0, 1.0]], [[1.0, 2.0, 3.0]]])[:, None]
assert Symmetry(3.0)(torch.stack([mirrored, skewed])).tolist() == [0.0, -8.0]  # 3 (4 + 0 + 4) / 3
assert torch.allclose(prior.denoise(x, torch.tensor([1.0, 3.0])), x / torch.tensor([2.0, 10.0]).view(2, 1, 1, 1))

y = A(x) + 0.1 * torch.randn_like(x)
problem = Problem(prior, Likelihood(A, y, 0.1))
result = run(ProximalFlow(num_steps=20), problem, 2, seed=0, progress=False)
assert result.samples.shape == (2, 2, 3, 4, 5)
error = (result.samples - x[:, None]).std()
blind = (run(Unconditional(num_steps=20), problem, 2, seed=0, progress=False).samples - x[:, None]).std()
assert error < 0.2 < 1 < blind, (error, blind)
print("done")
"""


def entries() -> list[str]:
    """The paths of the map."""
    lines = GUIDE.read_text("utf-8").split("## The map\n\n```\n")[1].split("```")[0].splitlines()
    assert len(lines) == 10
    return [path for line in lines for path in re.split(" {2,}", line)[0].split(" ")]


def test_the_map_names_every_folder():
    names = {path.rstrip("/") for path in entries() if path.endswith("/")}
    for name in names:
        assert (ROOT / name).is_dir(), name
    folders = {  # that hold modules
        path.relative_to(ROOT).as_posix()
        for top in (ROOT, ROOT / "invguide")
        for path in top.iterdir()
        if any(path.glob("*.py")) and not path.is_symlink()
    }
    assert folders - {"invguide"} <= names, folders - names


@pytest.mark.slow
def test_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text("utf-8"), re.DOTALL)
    classes = [re.findall(r"^class (\w+)", block, re.MULTILINE)[-1:] for block in blocks]
    assert [name for found in classes for name in found] == [
        "Flip",
        "ProximalFlow",
        "White",
        "Symmetry",
    ]
    checks = [block for block, found in zip(blocks, classes, strict=True) if not found]
    assert re.findall(r"^check_\w+", "\n".join(checks), re.MULTILINE) == [
        "check_operator",
        "check_solver",
        "check_prior",
    ]
    code = "\n".join([*blocks, USE])
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "done"
