"""The house stays in order: folders import each other in one direction, files and functions stay short."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOPS = ("invguide", "operators", "solvers")
# Conveniences such as operator.check(), imported inside the methods that offer them: (importer, imported) rooms.
DOOR = {
    ("forward_operator", "adapters"),
    ("forward_operator", "diagnostics"),
    ("reward", "adapters"),
    ("reward", "diagnostics"),
    ("priors.network", "priors.doctor"),
}
FILE, FUNCTION, IN_THE_ROOT = 350, 60, 18


def sources(root: Path) -> dict[str, Path]:
    """Module name -> file, of all modules by their real paths."""
    found = {}
    for top in TOPS:
        for path in sorted((root / top).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if "__pycache__" in parts or parts[:2] in {("invguide", top) for top in TOPS[1:]}:
                continue
            parts = parts if parts[0] == "invguide" else ("invguide", *parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a module imports, anywhere in it but for the type checker."""
    found: set[str] = set()

    def walk(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.ImportFrom) and child.module:
                for alias in child.names:
                    full = f"{child.module}.{alias.name}"
                    found.add(full if full in known else child.module)
            elif isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            walk(child)

    walk(ast.parse(path.read_text("utf-8")))
    return {module for module in found if module in known and module != name}


def room(module: str, files: dict[str, Path]) -> str:
    """The folder of a module, or the module itself in the root; rooms of `priors` are told apart."""
    parts = module.split(".")[1:]
    if not parts:
        return "invguide"
    if parts[0] == "priors" and len(parts) > 1:
        return ".".join(parts[:2])
    return parts[0]


def circle(root: Path) -> list[str]:
    files = sources(root)
    rooms: dict[str, set[str]] = {}
    for name, path in files.items():
        here = room(name, files)
        for other in imports(name, path, files):
            there = room(other, files)
            if here != there and (here, there) not in DOOR:
                rooms.setdefault(here, set()).add(there)
    try:
        TopologicalSorter(rooms).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_rooms_import_each_other_in_one_direction() -> None:
    assert circle(ROOT) == []


def test_a_planted_circle_is_found(tmp_path: Path) -> None:
    for path in sources(ROOT).values():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    with (tmp_path / "invguide" / "numerics" / "linear.py").open("a") as file:
        file.write("\n\ndef late():\n    from invguide.problem import Problem\n")
    found = circle(tmp_path)
    assert {"numerics", "problem"} <= set(found)


def test_the_root_holds_the_words_of_the_field() -> None:
    assert len(list((ROOT / "invguide").glob("*.py"))) <= IN_THE_ROOT


@pytest.mark.parametrize("name", sorted(sources(ROOT)))
def test_files_and_functions_are_short_or_say_why_not(name: str) -> None:
    path = sources(ROOT)[name]
    text = path.read_text("utf-8")
    lines = text.splitlines()
    if len(lines) > FILE:
        assert any(line.startswith(f"# Longer than {FILE} lines: ") for line in lines), len(lines)
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef):
            continue
        first = node.body[0]
        doc = 0
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            doc = (first.end_lineno or 0) - first.lineno + 1
        length = (node.end_lineno or 0) - first.lineno + 1 - doc
        start = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        said = lines[start - 2].strip().startswith(f"# Longer than {FUNCTION} lines: ")
        assert length <= FUNCTION or said, f"{node.name}: {length} lines"
