"""Every notebook runs from nothing, and is committed with the output of one clean run.

`python tests/repository/test_notebooks.py [NAME ...]` runs them and writes outputs, with the prior that they name.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LIMIT = 400_000  # bytes of a file with its pictures
PRIVATE = ("/work", "/tmp", "/home", "/root", "/Users", "site-packages", "Warning")

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def execute(path: Path, folder: Path) -> Any:
    """Run a copy in another folder, in a kernel of its own; the notebook with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    return notebook


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def pictures(notebook: Any) -> int:
    return sum("image/jpeg" in output.get("data", {}) for output in outputs(notebook))


@pytest.mark.slow
@each
def test_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("INVGUIDE_NOTEBOOK_PRIOR", "natural-tiny")
    monkeypatch.setenv("INVGUIDE_NOTEBOOK_STEPS", "3")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel draws into the notebook
    before = path.read_bytes()
    notebook = execute(path, tmp_path)
    assert path.read_bytes() == before
    committed = nbformat.read(path, as_version=4)
    assert pictures(notebook) == pictures(committed) > 0
    printed = [o.text for o in outputs(notebook) if o.get("name") == "stderr"]
    # Progress bars only; a bar is wiped with blanks, which may come on their own.
    assert not [text for text in printed if text.strip() and not re.search("it/s|s/it", text)]


@each
def test_is_committed_as_one_clean_run(path: Path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [
        o for o in outputs(notebook) if o.output_type == "error" or o.get("name") == "stderr"
    ]
    text = path.read_text("utf-8")
    assert len(text) < LIMIT
    for word in PRIVATE:
        assert word not in text, word


def test_there_are_notebooks():
    assert NOTEBOOKS


def refresh(path: Path) -> None:
    """Run a notebook and keep its outputs, without progress bars and with nothing of this machine."""
    import tempfile

    folder = Path(tempfile.mkdtemp())
    notebook = execute(path, folder)
    shutil.rmtree(folder)
    for cell in code_cells(notebook):
        cell.metadata = {}
        cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nbformat.write(notebook, path)
    print(f"{path.name}: {path.stat().st_size} bytes, {pictures(notebook)} pictures")


if __name__ == "__main__":
    os.environ.pop("MPLBACKEND", None)
    for each_path in NOTEBOOKS:
        if not sys.argv[1:] or each_path.stem in sys.argv[1:]:
            refresh(each_path)
