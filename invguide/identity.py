"""What decides the result of a run, in words and fingerprints: a checkpoint goes on only where all of it agrees."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from invguide.prior import Prior
from invguide.problem import Problem
from invguide.reward import Reward, terms
from invguide.solver import Solver


@functools.cache
def versions() -> Mapping[str, str]:
    """Of Python and the packages that matter; looking them up takes as long as a call of a small network."""
    from importlib import metadata

    found = {"python": platform.python_version()}
    for name in ("invguide", "torch", "deepinv", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def fingerprint(*tensors: Tensor) -> str:
    """Short hash of dtypes, shapes and values; of a strided part of the values where a tensor is large."""
    digest = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
        flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
        stride = max(1, flat.numel() // 65536)
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        values = flat[::stride].cpu()
        values = (
            values.float() if values.is_floating_point() and values.element_size() < 4 else values
        )
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]


def describe_prior(prior: Prior) -> str:
    """Return the kind, a fingerprint of the weights, the precision and the settings of a prior: all that decides D."""
    weights = fingerprint(*(t for _, t in sorted(prior.state_dict(keep_vars=True).items())))
    return f"{type(prior).__name__} {weights} {prior.precision} {prior.extra_repr()}".strip()


def run_identity(
    solver: Solver[Any], problem: Problem, num_samples: int, seed: int, dtype: torch.dtype
) -> dict[str, str]:
    """What must agree for a checkpoint to be resumed."""
    identity = {
        "solver": json.dumps(solver.settings, sort_keys=True, default=str),
        "num_samples": str(num_samples),
        "seed": str(seed),
        "shape": str(tuple(problem.shape)),
        "dtype": str(dtype),
        "prior": describe_prior(problem.prior),
        "precision": problem.prior.precision,
    }
    if problem.condition:
        identity["condition"] = fingerprint(
            *(problem.condition[k] for k in sorted(problem.condition))
        )
    likelihood = problem.likelihood
    if likelihood is not None:
        buffers = [t for _, t in sorted(likelihood.operator.state_dict().items())]
        described = " ".join(repr(likelihood.operator).split())  # its numbers; tensors follow
        identity["operator"] = f"{described} {fingerprint(*buffers)}"
        sigma = getattr(likelihood.noise, "sigma_y", None)
        identity["noise"] = type(likelihood.noise).__name__ + (
            f" {fingerprint(sigma)}" if sigma is not None else ""
        )
        identity["y"] = fingerprint(likelihood.y)
    if problem.reward is not None:
        described = re.sub(r" at 0x[0-9a-f]+", "", repr(problem.reward))
        identity["reward"] = f"{described} {fingerprint(*_tensors_of(problem.reward))}"
    return identity


def _tensors_of(reward: Reward) -> Iterator[Tensor]:
    """What a reward holds as its fields: tensors, and the weights of networks."""
    for _, part in terms(reward):
        for _, value in sorted(vars(part).items()):
            if isinstance(value, nn.Module):
                yield from (t for _, t in sorted(value.state_dict(keep_vars=True).items()))
            elif isinstance(value, Tensor):
                yield value
