"""What several test files share: solvers of few steps, and a prior of 6 x 6 signals."""

from __future__ import annotations

from typing import Any

import torch

import invguide as ig
import invguide.solvers
from invguide.solver import Solver

FEW: dict[str, dict[str, Any]] = {
    "DFlow": {"num_steps": 8},
    "DOODL": {"num_steps": 8},
    "EKI": {"ensemble_size": 16},
    "EnKG": {"ensemble_size": 16, "num_steps": 12},
    "EnsembleTwisted": {"ensemble_size": 16, "num_steps": 12},
    "FeynmanKac": {"ensemble_size": 16, "num_steps": 12},
    "SCG": {"num_steps": 12},
    "SymplecticAdjoint": {"num_steps": 12},
    "TweedieMatheron": {"num_steps": 8},
    "ExactPosterior": {},
    "HQS": {"num_steps": 12},
    "REDDiff": {"num_steps": 40},
    "PosteriorMean": {"num_steps": 1},
}
MEASURING = sorted(
    name
    for name, kind in Solver.registry.items()
    if kind.requires.target in ("likelihood", "either")
    and not kind.requires.counts  # its units are those of counts: tests/solvers/test_anscombe.py
    and kind.__module__.startswith("invguide.")
)


def small_prior(dtype: torch.dtype) -> ig.priors.Gaussian:
    i = torch.arange(6.0, dtype=torch.float64)
    smooth = torch.exp(-((i[:, None] - i) ** 2) / 8) + 0.1 * torch.eye(6, dtype=torch.float64)
    found = ig.priors.Gaussian(
        torch.zeros(1, 6, 6, dtype=dtype), 0.2 * torch.kron(smooth, smooth).to(dtype)
    )
    return found
