"""What a run has done so far, and how it is kept in a checkpoint."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invguide.engine.checkpoint import damaged, load_checkpoint
from invguide.engine.run_identity import Identity
from invguide.problem.seen import Seen
from invguide.solver import Solver

SampleIndex = tuple[int, int]  # measurement, sample


@dataclass
class Chunk:
    """Samples that advance together, and where they are."""

    rows: list[SampleIndex]
    step: int = 0
    state: Any = None
    seen: Seen = field(default_factory=Seen)  # what the target has answered

    def content(self) -> dict[str, Any]:
        state = {name: t.cpu() for name, t in self.state._asdict().items()}
        rows = [list(row) for row in self.rows]
        return {"rows": rows, "step": self.step, "state": state, "seen": self.seen.content()}


@dataclass
class Progress:
    """Everything that a checkpoint must hold."""

    samples: Tensor  # (measurements, samples, *shape), data units
    chi2: Tensor  # (measurements, samples)
    log_prob: Tensor
    log_weights: Tensor
    status: dict[SampleIndex, str] = field(default_factory=dict)
    warnings: dict[SampleIndex, str] = field(default_factory=dict)
    chunks: list[Chunk] = field(default_factory=list)  # on their way, one for each device
    data_size: float | None = None  # of clean signals, where it was measured
    seconds: float = 0.0
    counters: list[int] = field(default_factory=lambda: [0, 0, 0])

    @classmethod
    def blank(cls, count: int, num_samples: int, shape: tuple[int, ...], dtype: torch.dtype):
        """Nothing is done yet."""
        unknown = torch.full((count, num_samples), float("nan"), dtype=dtype)
        return cls(
            samples=torch.full((count, num_samples, *shape), float("nan"), dtype=dtype),
            chi2=unknown,
            log_prob=unknown.clone(),
            log_weights=torch.zeros(count, num_samples, dtype=dtype),
        )

    def content(self) -> dict[str, Any]:
        """All of it as tensors, numbers, strings and lists."""
        return {
            "samples": self.samples,
            "chi2": self.chi2,
            "log_prob": self.log_prob,
            "log_weights": self.log_weights,
            "status": [[b, s, text] for (b, s), text in self.status.items()],
            "warnings": [[b, s, text] for (b, s), text in self.warnings.items()],
            "data_size": self.data_size,  # not measured twice
            "seconds": self.seconds,
            "counters": self.counters,
            "chunks": [chunk.content() for chunk in self.chunks if chunk.state is not None],
        }


def restored(
    path: Path, identity: Identity, blank: Progress, solver: Solver[Any], trust: Collection[str]
) -> Progress:
    """What a checkpoint holds.

    Args:
        path: Of the checkpoint.
        identity: Of this run.
        blank: How far this run is without it, with the shapes that are to be expected.
        solver: Of this run.
        trust: As for `load_checkpoint`.

    Raises:
        CheckpointError: It is damaged, of another run, or does not hold what a run leaves.
    """
    content = load_checkpoint(path, identity, trust)
    try:
        found = _read(content, solver)
        wrong = _wrong(found, blank, solver)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from error
    if wrong:
        raise damaged(path, wrong)
    return found


def _read(content: dict[str, Any], solver: Solver[Any]) -> Progress:
    progress = Progress(
        **{name: content[name] for name in ("samples", "chi2", "log_prob", "log_weights")},
        status={(b, s): text for b, s, text in content["status"]},
        warnings={(b, s): text for b, s, text in content["warnings"]},
        **{name: content[name] for name in ("data_size", "seconds", "counters")},
    )
    for chunk in content["chunks"]:
        state = solver.state_type(**chunk["state"])
        rows, seen = [(b, s) for b, s in chunk["rows"]], Seen.of(chunk["seen"])
        progress.chunks.append(Chunk(rows, chunk["step"], state, seen))
    return progress


def _wrong(found: Progress, blank: Progress, solver: Solver[Any]) -> str:
    """Why this cannot be what a run of this kind has left; empty where it can."""
    for name in ("samples", "chi2", "log_prob", "log_weights"):
        there, here = getattr(found, name), getattr(blank, name)
        if there.shape != here.shape or there.dtype != here.dtype:
            return f"{name} has shape {tuple(there.shape)}, expected {tuple(here.shape)}"
    count, samples = blank.chi2.shape
    begun = [row for chunk in found.chunks for row in chunk.rows]
    rows = [*found.status, *begun]
    if len(set(rows)) < len(rows) or not {*rows, *found.warnings} <= {
        (b, s) for b in range(count) for s in range(samples)
    }:
        return "its list of samples is not one of this run"
    for chunk in found.chunks:
        if not 0 <= chunk.step <= solver.num_steps:
            return f"step {chunk.step} of {solver.num_steps}"
        if any(len(t) != len(chunk.rows) or t.is_meta for t in chunk.state):
            return f"a state does not have one row for each of its {len(chunk.rows)} samples"
    numbers = (found.seconds, *found.counters, found.data_size or 0.0)
    if len(found.counters) != 3 or not all(0 <= n < float("inf") for n in numbers):
        return "its counts are no counts"
    return ""
