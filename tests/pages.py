"""The pages that people read: README.md, CONTRIBUTING.md and docs/, and what stands in them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)


def commands(page: Path) -> list[str]:
    """Every `invguide ...` of a page: shell blocks, comments, and code within sentences."""
    text = page.read_text("utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    comments = re.findall(r"<!--(.*?)-->", text, re.DOTALL)
    lines = [line for part in (*blocks, *comments) for line in part.splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    parts += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    return list(dict.fromkeys(part for part in parts if part.startswith("invguide ")))


def table(page: Path, heading: str) -> dict[str, dict[str, str]]:
    """The table whose first column has this heading: a row for each name, without backticks."""
    lines = page.read_text("utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
    head, _, *body = rows
    return {row[0]: dict(zip(head, row, strict=True)) for row in body}


def anchors(page: Path) -> set[str]:
    """What a heading is called in a link."""
    prose = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    return {
        re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in prose.splitlines()
        if line.startswith("#")
    }
