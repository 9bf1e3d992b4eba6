"""What users install: the wheel holds every file and works far from the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINKS = ("operators", "solvers")
DATA = (".jpg", ".json", ".md", ".npz", ".png", ".safetensors")


def call(*command: str | Path, cwd: Path, **environment: str) -> str:
    run = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={
            **os.environ,
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PYTHONSAFEPATH": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, f"{command}\n{run.stdout}\n{run.stderr}"
    return run.stdout


def expected_files() -> set[str]:
    """Modules and data of the working tree, by their names inside the wheel."""
    names = {"invguide/py.typed"}
    for top in ("invguide", *LINKS):
        for folder, _, files in os.walk(ROOT / top):  # os.walk does not follow links
            if "__pycache__" in folder:
                continue
            relative = Path(folder).relative_to(ROOT)
            inside = relative if top == "invguide" else Path("invguide") / relative
            names |= {(inside / f).as_posix() for f in files if Path(f).suffix in (".py", *DATA)}
    return names


def copy_tree(destination: Path, *, links: bool) -> Path:
    """Copy what a build needs, so that the working tree gets no build folder and lends no stale one."""
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        destination.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, destination)
    for top in ("invguide", *LINKS):
        shutil.copytree(ROOT / top, destination / top, symlinks=True, ignore=ignore)
    for name in LINKS:
        link = destination / "invguide" / name
        link.unlink()
        if links:
            link.symlink_to(f"../{name}")
        else:
            link.write_text(f"../{name}")  # what git leaves where it may not make links
    return destination


def build_wheel(source: Path, out: Path) -> Path:
    """Build without the network where this environment has setuptools, else in pip's isolation."""
    try:
        isolation = (
            [] if int(version("setuptools").split(".")[0]) < 77 else ["--no-build-isolation"]
        )
    except PackageNotFoundError:
        isolation = []
    call(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        *isolation,
        "-w",
        out,
        source,
        cwd=out.parent,
    )
    (wheel,) = out.glob("invguide-*.whl")
    return wheel


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("wheel")
    return build_wheel(copy_tree(base / "source", links=True), base / "out")


@pytest.mark.slow
def test_wheel_holds_every_file(wheel: Path):
    names = names_in(wheel)
    assert sorted(expected_files() - names) == []
    content = {name for name in names if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in content} == {"invguide"}, "nothing else at top level"
    assert any(name.endswith("licenses/LICENSE") for name in names)
    for weights in [name for name in content if name.endswith(".safetensors")]:
        card = str(Path(weights).with_suffix(".md").as_posix())
        assert card in content, f"{weights} has no model card beside it"


def test_wheel_without_links_is_the_same(wheel: Path, tmp_path: Path):
    other = build_wheel(copy_tree(tmp_path / "source", links=False), tmp_path / "out")
    assert names_in(other) - {"invguide/operators", "invguide/solvers"} == names_in(wheel)


@pytest.mark.slow
def test_source_archive_builds_the_same_wheel(wheel: Path, tmp_path: Path):
    pytest.importorskip("build")
    pytest.importorskip("setuptools", minversion="77")
    source = copy_tree(tmp_path / "source", links=True)
    call(
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "-o",
        tmp_path / "out",
        source,
        cwd=tmp_path,
    )
    assert list((tmp_path / "out").glob("invguide-*.tar.gz"))
    (other,) = (tmp_path / "out").glob("invguide-*.whl")
    assert names_in(other) == names_in(wheel)


USE = """
import importlib, pkgutil, sys
import invguide, invguide.operators, invguide.solvers
target = sys.argv[1]
modules = [m.name for m in pkgutil.walk_packages(invguide.__path__, "invguide.")]
for name in [m for m in modules if not m.endswith("__main__")]:
    found = importlib.import_module(name).__file__
    assert found.startswith(target), f"{name} came from {found}"
assert "invguide.operators" in modules
assert "invguide.solvers" in modules
print(len(modules), "modules")
"""


@pytest.mark.slow
def test_installed_wheel_works_from_an_empty_folder(wheel: Path, tmp_path: Path):
    target, empty = tmp_path / "target", tmp_path / "empty"
    empty.mkdir()
    call(
        *(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index"),
        *("--target", target, wheel),
        cwd=empty,
    )
    out = call(sys.executable, "-c", USE, target, cwd=empty, PYTHONPATH=str(target))
    assert out.strip().endswith("modules")
    assert (target / "bin" / "invguide").exists() or (target / "Scripts" / "invguide.exe").exists()
