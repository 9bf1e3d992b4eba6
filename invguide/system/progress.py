"""Progress on standard error: one bar, shown only once a run has taken two seconds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def progress_bar(total: int, label: str, enabled: bool = True) -> Iterator[Any]:
    """Yield a tqdm bar; it stays silent where `enabled` is False or standard error is closed."""
    from tqdm import tqdm

    with tqdm(
        total=total,
        desc=label,
        delay=2,
        disable=not enabled or sys.stderr is None,
        leave=False,
        dynamic_ncols=True,
    ) as bar:
        yield bar
