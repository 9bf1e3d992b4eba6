"""The shape of the repository: links, package list, one import identity, layers, light imports."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
LINKS = ("operators", "solvers")
HEAVY = (
    "PIL",
    "deepinv",
    "diffusers",
    "kornia",
    "matplotlib",
    "pandas",
    "scipy",
    "torchvision",
    "typer",
)


def python(code: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},  # this checkout, whatever is installed
        capture_output=True,
        text=True,
        timeout=900,
    )


def source_files() -> list[Path]:
    """Every module of the package by its real path, relative to the root."""
    found = (p for top in ("invguide", *LINKS) for p in (ROOT / top).rglob("*.py"))
    relative = (p.relative_to(ROOT) for p in found if "__pycache__" not in p.parts)
    # Path.rglob follows links on some Python versions and not on others.
    return sorted(
        {p for p in relative if p.parts[:2] not in {("invguide", name) for name in LINKS}}
    )


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    parts = parts if parts[0] == "invguide" else ("invguide", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def pyproject() -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # pyright: ignore[reportMissingImports]
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def declared_packages() -> list[str]:
    return pyproject()["tool"]["setuptools"]["packages"]


def lowest(requirements: list[str], sign: str) -> dict[str, Version]:
    """The version of each package that a sign, such as >=, stands before."""
    found = {}
    for requirement in map(Requirement, requirements):
        (specifier,) = requirement.specifier
        assert specifier.operator == sign, requirement
        found[requirement.name] = Version(specifier.version)
    return found


def test_the_lowest_versions_are_those_that_are_tested():
    """Of what users install; tools of the tests alone are the newest."""
    project = pyproject()["project"]
    extras = project["optional-dependencies"]
    allowed = lowest(project["dependencies"] + extras["cluster"] + extras["diffusers"], ">=")
    lines = (ROOT / ".ci" / "lowest.txt").read_text("utf-8").splitlines()
    tested = lowest([line for line in lines if not line.startswith("#")], "==")
    assert tested == allowed, "make .ci/lowest.txt agree with pyproject.toml"
    for name, version in lowest([r for r in extras["test"] if "[" not in r], ">=").items():
        assert version == allowed.get(name, version), f"{name}: two lowest versions"


@pytest.mark.parametrize("name", LINKS)
def test_link_resolves_to_its_folder(name: str):
    link = ROOT / "invguide" / name
    if not link.is_symlink():
        assert link.is_file(), (
            f"{link} is missing or became a folder: restore the link with git checkout"
        )
        pytest.skip("this clone has plain files instead of links")
    assert link.resolve() == ROOT / name
    assert not os.path.isabs(os.readlink(link))


def test_packages_are_the_folders_with_an_init():
    expected = {module_name(p) for p in source_files() if p.name == "__init__.py"}
    declared = declared_packages()
    assert len(declared) == len(set(declared))
    assert set(declared) == expected, "make [tool.setuptools] packages in pyproject.toml agree"


def test_every_module_lies_in_a_package():
    for path in source_files():
        assert (ROOT / path.parent / "__init__.py").is_file(), f"{path.parent} has no __init__.py"


@pytest.mark.parametrize("name", LINKS)
def test_second_identity_is_refused(name: str):
    run = python(f"import {name}")
    assert run.returncode != 0
    assert f"import this package as 'invguide.{name}'" in run.stderr


# Each module is imported first once, as in a fresh interpreter; torch and the like stay loaded to save minutes.
IMPORT_EACH_FIRST = """
import importlib, json, sys, traceback
failed = {}
for name in json.loads(sys.argv[1]):
    for loaded in [m for m in sys.modules if m.split(".")[0] == "invguide"]:
        del sys.modules[loaded]
    try:
        importlib.import_module(name)
    except Exception:
        failed[name] = traceback.format_exc(limit=-3)
print(json.dumps(failed))
"""


@pytest.mark.slow
def test_each_module_can_be_imported_first(tmp_path: Path):
    names = [module_name(p) for p in source_files() if p.name != "__main__.py"]
    assert {"invguide", "invguide.operators", "invguide.solvers"} <= set(names)
    run = python(IMPORT_EACH_FIRST, json.dumps(names), cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    failed = json.loads(run.stdout.splitlines()[-1])
    assert not failed, "\n".join(f"{name}:\n{trace}" for name, trace in failed.items())


@pytest.mark.slow
def test_import_loads_no_heavy_module():
    before = python("import sys, torch; print(*sys.modules)")
    after = python("import sys, torch, invguide; print(*sys.modules)")
    assert after.returncode == 0, after.stderr
    added = {name.split(".")[0] for name in set(after.stdout.split()) - set(before.stdout.split())}
    assert "invguide" in added
    assert not added & set(HEAVY), "import these inside the function that needs them"


# What torch's own checkpointing loads is not ours: in torch 2.6 that is sympy.
A_RUN = """
import sys, torch, torch.utils.checkpoint
before = set(sys.modules)
import invguide as ig
from invguide.solvers import DPS
prior = ig.priors.Gaussian([0.5, -0.3], [[1.0, 0.6], [0.6, 0.5]])
ig.solve(torch.ones(1, 1), lambda x: x[:, :1], prior, sigma_y=0.1, solver=DPS(2), progress=False)
print(*(set(sys.modules) - before))
"""


@pytest.mark.slow
def test_a_run_loads_no_heavy_module():
    """Nor sympy, which torch imports for some of its conveniences, and takes a second for."""
    run = python(A_RUN)
    assert run.returncode == 0, run.stderr
    loaded = {name.split(".")[0] for name in run.stdout.split()}
    assert not loaded & {*HEAVY, "sympy"}


def lint_imports(config: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("importlinter")
    call = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    environment = {**os.environ, "PYTHONPATH": str(cwd)}
    return subprocess.run(
        [sys.executable, "-c", call, "--no-cache", "--no-logo", "--config", str(config)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


def needs_links() -> None:
    if not all((ROOT / "invguide" / name).is_symlink() for name in LINKS):
        pytest.skip("import-linter walks folders and needs the links")


def test_layers_are_kept():
    needs_links()
    run = lint_imports(ROOT / "pyproject.toml", ROOT)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("solvers/planted_a.py", "from invguide.operators import planted_b"),
        ("solvers/planted_a.py", "from invguide.solvers import planted_b"),
        ("operators/planted_a.py", "from invguide.priors import unet"),
        ("invguide/prior.py", "from invguide.solvers import planted_b"),
        ("invguide/prior.py", "import invguide.api"),
        ("invguide/planted_c.py", "import torch"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, module: str, line: str):
    """The contracts are able to fail: on a copy of the tree, each forbidden import breaks one."""
    needs_links()
    for path in source_files():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes((ROOT / path).read_bytes())
    for name in LINKS:
        (tmp_path / "invguide" / name).symlink_to(f"../{name}")
        (tmp_path / name / "planted_b.py").touch()
    (tmp_path / "invguide" / "api.py").touch()
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    target = tmp_path / module
    before = target.read_text("utf-8") if target.exists() else ""
    target.write_text(f"{before}\n{line}\n", "utf-8")
    run = lint_imports(tmp_path / "pyproject.toml", tmp_path)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "BROKEN" in run.stdout
    assert "planted" in run.stdout or "invguide.api" in run.stdout


def public_siblings(text: str, folder: str, own: str) -> set[str]:
    """Names of public modules of the same folder that a module's text imports, in any form."""
    package, found = f"invguide.{folder}", set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            base = f"{package}.{base}".rstrip(".") if node.level else base
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        parts = [
            n.removeprefix(package + ".").split(".")[0]
            for n in names
            if n.startswith(package + ".")
        ]
        found |= {name for name in parts if not name.startswith("_") and name != own}
    return found


@pytest.mark.parametrize("folder", LINKS)
def test_one_algorithm_per_file_and_none_imports_another(folder: str):
    for path in sorted((ROOT / folder).rglob("*.py")):
        if path.name != "__init__.py":
            siblings = public_siblings(path.read_text("utf-8"), folder, path.stem)
            assert not siblings, (
                f"{path.relative_to(ROOT)} imports {siblings}; share through a private `_name.py`"
            )


@pytest.mark.parametrize(
    "line",
    [
        "from invguide.operators import other",
        "from invguide.operators import Other",
        "from invguide.operators.other import Other",
        "import invguide.operators.other as o",
        "from . import other",
        "from .other import Other",
        "def f():\n    from .other import Other",
    ],
)
def test_an_import_of_another_operator_is_found(line: str):
    assert public_siblings(line, "operators", "mine")
    assert not public_siblings(
        line.replace("other", "_other").replace("Other", "_Other"), "operators", "mine"
    )
